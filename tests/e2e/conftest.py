"""A service with a real engine on a tiny random model, and tenants of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.tiny_model import save_tiny_model
from local_service import LocalService, local_service

from tensafe_client import ServiceClient

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_service(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[LocalService]:
    """`tensafe up --backend torch --model tiny=DIRECTORY`."""
    with local_service(
        backend="torch",
        models=[f"tiny={tiny_model}"],
        options=["--dtype", "float32"],
        directory=tmp_path_factory.mktemp("tiny-service"),
    ) as running:
        yield running


@pytest.fixture
def new_key(tiny_service: LocalService) -> Iterator[Callable[[], str]]:
    """Makes a tenant and a key for it."""
    with ServiceClient(tiny_service.target, api_key=tiny_service.admin_key) as operator:

        def make() -> str:
            name = f"tenant-{next(_numbers)}"
            operator.admin.create_tenant(name)
            return operator.admin.create_key(name).secret

        yield make


@pytest.fixture
def new_tenant(
    tiny_service: LocalService, new_key: Callable[[], str]
) -> Iterator[Callable[[], ServiceClient]]:
    """Makes a tenant, and a client with its key."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(ServiceClient(tiny_service.target, api_key=new_key()))
