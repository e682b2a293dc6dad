"""A fake coordinator, and a client of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import API_KEY, FakeCoordinator

from tensafe_client import ServiceClient, TrainingClient


@pytest.fixture(autouse=True)
def _no_ambient_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TENSAFE_TARGET", "TENSAFE_API_KEY", "TENSAFE_PROFILE", "TENSAFE_CA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TENSAFE_CONFIG", str(tmp_path / "config.toml"))


@pytest.fixture
def server() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeCoordinator) -> Iterator[ServiceClient]:
    made = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
    yield made
    made.close()


@pytest.fixture
def tc(client: ServiceClient) -> TrainingClient:
    return client.create_training_client({"model_ref": "mock"})


@pytest.fixture
def batch() -> dict[str, list[list[int]]]:
    return {"input_ids": [[5, 6, 7], [8, 9, 1]], "labels": [[-100, 6, 7], [8, 9, 1]]}


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
