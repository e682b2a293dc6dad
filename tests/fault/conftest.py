"""What the fault tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model of two layers."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
