"""What a step's draw comes from, and who gets the same again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensafe.v1 import privacy_pb2 as pb
from tensafe.v1 import training_pb2 as training
from tensafe.v1.privacy_pb2 import DpConfig
from tensafe_server.operations.model import RunState, run_state
from tensafe_server.privacy import draws as module
from tensafe_server.privacy.draws import Draws
from tensafe_server.store.base import RunRow


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each draw was to come from."""
    found: list[Any] = []

    def spy(count: int, rate: float, seed: Any) -> np.ndarray:
        assert (count, rate) == (10, 0.5)
        found.append(seed)
        return np.array([len(found)])

    monkeypatch.setattr(module, "draw", spy)
    return found


def drawn(draws: Draws, run: RunState, operation: str, charge: str) -> list[int]:
    own: Any = SimpleNamespace(row=SimpleNamespace(id=operation), charge=SimpleNamespace(id=charge))
    reader: Any = SimpleNamespace(count=10)
    assert run.private is not None
    return list(asyncio.run(draws._draw(own, run, run.private, reader)))


def a_run(**more: Any) -> RunState:
    own = DpConfig(
        enabled=True,
        dataset_id="rows",
        sampling=pb.DP_SAMPLING_SERVER_POISSON,
        accountant_type=pb.DP_ACCOUNTANT_PLD,
        privacy_unit=pb.PRIVACY_UNIT_EXAMPLE,
        adjacency=pb.DP_ADJACENCY_ADD_OR_REMOVE_ONE,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        target_delta=1e-5,
        sample_rate=0.5,
        expected_batch_size=5,
        **more,
    )
    config = training.RunConfig(model_ref="m", dp=own).SerializeToString()
    return run_state(RunRow("run-1", "ten-1", "m", config, 1, 0, 0, None, 0, 1))


def test_it_comes_from_no_seed(seeds: list[Any]) -> None:
    drawn(Draws(None, None, None), a_run(), "op-1", "charge-1")  # type: ignore[arg-type]
    assert seeds == [None]


def test_of_a_test_it_comes_from_its_seed(seeds: list[Any]) -> None:
    drawn(Draws(None, None, None), a_run(test_seed=7), "op-1", "charge-1")  # type: ignore[arg-type]
    assert seeds == [(7, "run-1/0")]


def test_the_same_charge_gets_the_same_and_another_one_a_fresh_draw(seeds: list[Any]) -> None:
    draws, run = Draws(None, None, None), a_run()  # type: ignore[arg-type]
    charges = ["charge-1", "charge-1", "charge-2", "charge-2"]
    assert [drawn(draws, run, "op-1", charge) for charge in charges] == [[1], [1], [2], [2]]
