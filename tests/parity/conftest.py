"""The base model of the parity tests."""

from __future__ import annotations

import pytest
import torch
from parity.tiny_runs import tiny_llama

from workers.engine.base_model import BaseModel, freeze


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Neighbouring test processes must not fight for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base() -> BaseModel:
    return freeze("tiny", tiny_llama())
