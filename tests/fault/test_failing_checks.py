"""A check of ours that fails on one operation takes no other one with it."""

from __future__ import annotations

from typing import Any

import pytest
from fault.order_world import World, forward_backward

from tensafe.v1 import training_pb2 as training
from tensafe_client.errors import from_status
from tensafe_server.operations import checks

BROKEN = (7, 8, 9)


def test_what_a_check_did_not_foresee_is_told_of_that_operation_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    check = checks.check_content

    def failing(spec: training.OperationSpec, *arguments: Any, **options: Any) -> float:
        if spec.forward_backward.batch.inline.input_tokens.shape[:] == [len(BROKEN)]:
            raise ZeroDivisionError("a secret of ours")
        return check(spec, *arguments, **options)

    monkeypatch.setattr(checks, "check_content", failing)
    world = World(runs=2)
    try:
        mine, other = world.next_seq
        specs = [
            training.OperationSpec(run_id=mine, seq=1, forward_backward=forward_backward()),
            training.OperationSpec(run_id=mine, seq=2, forward_backward=forward_backward(BROKEN)),
            training.OperationSpec(run_id=mine, seq=3, optim_step=training.OptimStep()),
            training.OperationSpec(run_id=other, seq=1, forward_backward=forward_backward()),
        ]
        outcomes = world.do(world.coordinator.intake.submit("ten-1", specs, "ses-1"))
        reasons = [from_status(o.error).reason if o.error else "" for o in outcomes]
        assert reasons == ["", "INTERNAL", "", ""]
        assert "secret" not in str(outcomes)
        assert "a secret of ours" in caplog.text
        assert len({outcome.operation_id for outcome in outcomes}) == 4, "each is on record"
        again = world.do(world.coordinator.intake.submit("ten-1", specs, "ses-1"))
        assert [o.operation_id for o in again] == [o.operation_id for o in outcomes]
    finally:
        world.close()
