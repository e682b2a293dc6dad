"""Why a private step failed is told only where it cannot depend on who was drawn."""

from __future__ import annotations

import pytest

from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe_client import DPConfig
from tensafe_server.privacy.released import release_error
from tensafe_server.privacy.runs import PrivateRun

WHY = "a pass of 4711 tokens"


def private(sampling: int) -> PrivateRun:
    dp = DPConfig(dataset_id="ds-1", noise_multiplier=1.0, sample_rate=0.5).to_proto()
    dp.sampling, dp.target_delta, dp.adjacency = sampling, 1e-5, 1
    return PrivateRun.of("run-1", training.RunConfig(dp=dp))


POISSON, ATTESTED = (private(sampling) for sampling in (1, 2))


@pytest.mark.parametrize("reason", ["OUT_OF_MEMORY", "NON_FINITE_GRADIENT", "INTERNAL"])
def test_a_failure_that_may_depend_on_the_draw_is_not_told(reason: str) -> None:
    fault = TenSafeFault(reason, WHY, tokens=4711).detail
    told = release_error(POISSON, fault, "op-1")
    assert told.reason == "INTERNAL"
    assert "4711" not in told.message
    assert told.metadata == {"operation_id": "op-1"}
    assert release_error(ATTESTED, fault, "op-1") == fault


@pytest.mark.parametrize("reason", ["MAX_STEPS_REACHED", "OPERATION_CANCELLED"])
def test_a_failure_that_does_not_is_told(reason: str) -> None:
    fault = TenSafeFault(reason, WHY).detail
    assert release_error(POISSON, fault, "op-1") == fault
