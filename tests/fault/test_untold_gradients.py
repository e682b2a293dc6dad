"""A gradient that was computed and cannot be told fails by itself, and its run goes on."""

from __future__ import annotations

import pytest
from fault.order_world import World
from fault.test_order_moves import GRADIENT, UPDATE, outcomes, submit

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
