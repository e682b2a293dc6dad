"""A worker without room on its own disk: another one tries what belongs to no run."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World, sample

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training

SAVE = {"save_state": training.SaveState()}


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=1, workers=2)
    yield made
    made.close()


def fill(world: World, *places: int) -> list[str]:
    """These workers' disks. Returns who was asked for room."""
    asked: list[str] = []

    def no_room(name: str):
        def refuse(*_: object) -> None:
            asked.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")

        return refuse

    for at in places:
        worker = world.hosts[at].worker
        worker.transfers.fetch = worker.transfers.upload = no_room(worker.name)  # type: ignore[method-assign]
    return asked


def saved(world: World) -> str:
    [run] = world.next_seq
    submit(world, run, GRADIENT, UPDATE, SAVE)
    world.finish()
    return world.result(world.rows(run)[-1]).save_state.artifact.id


def drawn(world: World, artifact_id: str) -> str:
    """SUCCEEDED, or the reason, of a sample of an artifact."""
    message = sample(1)
    message.weights.artifact_id = artifact_id
    spec = training.OperationSpec(request_id="request-1", sample=message)
    [outcome] = world.do(world.send([spec]))
    assert outcome.error is None, outcome
    world.finish()
    [told] = [one for one in world.told() if one.id == outcome.operation_id]
    if told.state == ops.OPERATION_STATE_SUCCEEDED:
        return "SUCCEEDED"
    return told.error.message


@pytest.mark.parametrize("full", [0, 1])
def test_the_other_one_draws_the_sample(world: World, full: int):
    artifact_id = saved(world)
    fill(world, full)
    assert drawn(world, artifact_id) == "SUCCEEDED"


def test_each_is_asked_once(world: World):
    artifact_id = saved(world)
    asked = fill(world, 0, 1)
    assert "no room for temporary files" in drawn(world, artifact_id)
    assert sorted(asked) == ["w0", "w1"]


def test_a_save_fails_and_its_run_stays(world: World):
    [run] = world.next_seq
    saved(world)
    fill(world, 0, 1)
    submit(world, run, GRADIENT, SAVE, UPDATE)
    world.finish()
    assert outcomes(world, run)[3:] == ["SUCCEEDED", "WORKER_DISK_FULL", "SUCCEEDED"]
    assert world.coordinator.ledger.runs[run].epoch == 1


def test_one_that_was_cancelled_is_not_tried_again(world: World):
    artifact_id = saved(world)
    asked = fill(world, 0, 1)
    message = sample(1)
    message.weights.artifact_id = artifact_id
    spec = training.OperationSpec(request_id="request-1", sample=message)
    [outcome] = world.do(world.send([spec]))
    for at in range(2):
        world.do(world.deliver(at))
    for host in world.hosts:
        host.worker.execute()
    assert world.do(world.cancel(outcome.operation_id))  # its worker has failed, and not said so
    world.finish()
    assert len(asked) == 1
