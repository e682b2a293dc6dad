"""A gradient or an update that was made and cannot be told fails by itself; its run goes on."""

from __future__ import annotations

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World
from google.rpc.status_pb2 import Status

from tensafe_server.fleet import dispatcher
from workers import wire


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(dispatcher, "_RETRY_S", 0.0)


def test_it_fails_alone_however_often(world: World, run: str, monkeypatch):
    pack = wire.forward_backward_result
    untold = []

    def brittle(outcome):
        if len(untold) < 4:
            untold.append(outcome)
            raise MemoryError
        return pack(outcome)

    monkeypatch.setattr(wire, "forward_backward_result", brittle)
    submit(world, run, *[GRADIENT] * 4, UPDATE, GRADIENT, UPDATE)
    world.finish()
    ended = outcomes(world, run)
    assert ended == ["INTERNAL"] * 4 + ["WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"]
    assert world.result(world.rows(run)[-1]).optim_step.step == 1
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run)[-2:] == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0


def test_an_update_that_can_never_be_told_fails_alone(world: World, run: str, monkeypatch):
    """It is tried again with its run, and what waits behind it does not fail with it."""
    pack = wire.optim_step_result
    untold = []

    def brittle(outcome):
        if len(untold) < 3:
            untold.append(outcome)
            raise MemoryError
        return pack(outcome)

    monkeypatch.setattr(wire, "optim_step_result", brittle)
    submit(world, run, GRADIENT, UPDATE, GRADIENT, UPDATE, GRADIENT, UPDATE)
    world.finish()
    rows = world.rows(run)
    assert outcomes(world, run) == ["SUCCEEDED", "INTERNAL", *["SUCCEEDED"] * 4]
    assert "nothing of it could be told" in Status.FromString(rows[1].error or b"").message
    assert [world.result(row).optim_step.step for row in (rows[3], rows[5])] == [1, 2]
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run)[-2:] == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0


def test_an_update_that_cannot_be_told_twice_is_told_the_third_time(
    world: World, run: str, monkeypatch
):
    pack = wire.optim_step_result
    untold = []

    def brittle(outcome):
        if len(untold) < 2:
            untold.append(outcome)
            raise MemoryError
        return pack(outcome)

    monkeypatch.setattr(wire, "optim_step_result", brittle)
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 2
    assert world.result(world.rows(run)[1]).optim_step.step == 1
