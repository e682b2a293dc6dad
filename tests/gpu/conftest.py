"""The engine on a GPU. Nothing here runs without one: `make test-gpu` where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DEVICE = "cuda:0"
HERE = Path(__file__).parent

# Read when the library starts; a worker sets it too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "needs an NVIDIA GPU and a torch that sees it: make test-gpu on a machine with one"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_left():
    """What one test took is not missing in the next."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
