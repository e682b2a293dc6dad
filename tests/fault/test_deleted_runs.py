"""A run that is deleted leaves its worker, whatever was being done for it."""

from __future__ import annotations

from unittest.mock import AsyncMock

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World, sample

from tensafe.v1.training_pb2 import RUN_STATUS_DELETED
from tensafe.v1.worker_pb2 import OperationStarted, Report


def held(world: World) -> list[str]:
    """The runs whose memory its worker has."""
    assert set(world.worker.executor._runs) == set(world.worker.backend._runs)
    return list(world.worker.backend._runs)


def test_one_that_rests(world: World, run: str):
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert held(world) == [run]
    world.do(world.delete_run(run))
    world.finish()
    assert held(world) == []


def test_one_whose_operation_runs_goes_when_that_has_ended(world: World, run: str):
    [running] = submit(world, run, GRADIENT)
    world.do(world.deliver())
    report = Report(started=[OperationStarted(operation_id=running, epoch=1)])
    world.do(world.coordinator.reception.report(world.link, report))
    world.do(world.delete_run(run))
    world.do(world.deliver())
    world.worker.execute()
    assert held(world) == [run]
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]
    assert held(world) == []


def test_one_whose_sample_is_stopped(world: World, run: str):
    submit(world, run, GRADIENT, UPDATE, {"sample": sample(5)})
    flow(world)
    world.do(world.delete_run(run))
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "SUCCEEDED", "OPERATION_CANCELLED"]
    assert held(world) == []


def test_one_whose_worker_is_not_believed_any_more(world: World, run: str):
    """It has executed what has ended as if it had never run."""
    [operation] = submit(world, run, GRADIENT)
    world.do(world.deliver())
    world.worker.execute()
    world.do(world.cut())
    world.worker.backend.credits = 0
    pending = world.coordinator.ledger.pending(operation)
    world.do(world.connect())
    world.coordinator.dispatcher.dispute(world.coordinator.ledger.runs[run])
    world.do(world.cancel(operation))
    assert pending.void
    world.do(world.delete_run(run))
    world.finish()
    assert held(world) == []


def test_one_that_a_lost_worker_was_at_leaves_the_next_one_too(world: World, run: str):
    submit(world, run, GRADIENT)
    world.do(world.deliver())
    world.worker.begin()
    world.do(world.report())
    world.do(world.delete_run(run))
    world.do(world.kill_worker())
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]
    assert held(world) == []


@pytest.mark.parametrize("failing", ["remember", "flushed"])
def test_a_delete_that_failed_half_way_is_made_whole_by_the_next(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch, failing: str
):
    submit(world, run, GRADIENT, UPDATE)
    with monkeypatch.context() as broken:
        broken.setattr(world.store, failing, AsyncMock(side_effect=OSError("disk full")))
        # Not through `world.do`, which itself waits for the store.
        with pytest.raises(OSError, match="disk full"):
            world.loop.run_until_complete(world.delete_run(run))
    assert world.coordinator.ledger.runs[run].deleted
    world.do(world.delete_run(run))
    world.finish()
    assert outcomes(world, run) == ["OPERATION_CANCELLED", "OPERATION_CANCELLED"]
    assert held(world) == []


def test_one_whose_coordinator_is_killed_before_it_has_cancelled(world: World, run: str):
    submit(world, run, GRADIENT, UPDATE)
    world.do(world.store.set_run_status(run, RUN_STATUS_DELETED))
    world.do(world.restart())
    world.finish()
    assert outcomes(world, run) == ["OPERATION_CANCELLED", "OPERATION_CANCELLED"]
    assert held(world) == []
