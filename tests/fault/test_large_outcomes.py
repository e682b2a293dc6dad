"""An outcome that no message can hold fails its operation once, by name; its run goes on."""

from __future__ import annotations

from typing import Any

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World, forward_backward, sample
from google.rpc.status_pb2 import Status

from tensafe.v1 import training_pb2 as training
from tensafe_server.fleet import dispatcher
from workers import outcome_size

MANY = range(1, 1000)
LARGE: dict[str, Any] = {"forward_backward": forward_backward(MANY)}


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_size, "MOST_BYTES", 2000)
    monkeypatch.setattr(dispatcher, "_RETRY_S", 0.0)


def test_a_gradient_is_missing_from_its_window(world: World, run: str):
    submit(world, run, GRADIENT, LARGE, UPDATE, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == [
        *("SUCCEEDED", "MESSAGE_TOO_LARGE", "WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED")
    ]
    failed = Status.FromString(world.rows(run)[1].error or b"").message
    assert "send a smaller batch" in failed
    assert "2,000" in failed
    assert world.result(world.rows(run)[-1]).optim_step.step == 1
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run)[-2:] == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0


def test_what_changes_nothing_fails_alone(world: World, run: str):
    scored = training.Forward(batch=forward_backward(MANY).batch)
    drawn = sample(1)
    drawn.prompts.extend([drawn.prompts[0]] * 200)
    submit(world, run, GRADIENT, {"forward": scored}, {"sample": drawn}, UPDATE)
    world.finish()
    assert outcomes(world, run) == [
        *("SUCCEEDED", "MESSAGE_TOO_LARGE", "MESSAGE_TOO_LARGE", "SUCCEEDED")
    ]
    assert world.coordinator.ledger.runs[run].epoch == 1, "the run stays where it is"


def test_it_takes_nobody_with_it_that_was_computed_beside_it():
    world = World(runs=2)
    run, other = world.next_seq
    submit(world, run, LARGE, UPDATE)
    submit(world, other, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["MESSAGE_TOO_LARGE", "WINDOW_POISONED"]
    assert outcomes(world, other) == ["SUCCEEDED"] * 2
    world.close()
