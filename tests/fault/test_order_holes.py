"""Courses of events with operations that are missing from a run's order: cancelled, too late or
failed."""

from __future__ import annotations

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World, forward_backward, sample

from tensafe.v1.worker_pb2 import Plan
from tensafe_server.fleet.link import WorkerLink


def test_a_hole_behind_what_was_lost_with_a_worker_is_told_to_the_next(world: World, run: str):
    _, cancelled = submit(world, run, GRADIENT, GRADIENT)
    world.do(world.deliver())  # both are there, and neither has begun
    world.do(world.cancel(cancelled))
    world.do(world.deliver())
    world.do(world.report())
    world.do(world.kill_worker())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "OPERATION_CANCELLED", "WINDOW_POISONED"]


def test_a_hole_that_is_told_twice_poisons_one_window(world: World, run: str):
    _, cancelled = submit(world, run, GRADIENT, GRADIENT)
    world.do(world.deliver())
    world.do(world.cancel(cancelled))
    world.do(world.deliver())
    world.do(world.report())
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    for _ in range(3):  # the worker has gone on past the hole, and is not heard of it
        world.do(world.deliver())
        world.worker.execute()
    world.do(world.cut())
    world.finish()
    expected = ["SUCCEEDED", "OPERATION_CANCELLED", "WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"]
    assert outcomes(world, run) == expected


@pytest.mark.parametrize("passes", ["before the loss", "after it", "while the coordinator is away"])
def test_a_deadline_is_no_concern_of_what_had_begun_when_its_worker_was_lost(
    world: World, run: str, passes: str
):
    late = world.do(world.submit(run, deadline=True, sample=sample(9)))
    flow(world, 2)
    assert world.is_running(late)
    if passes == "before the loss":
        world.do(world.pass_deadline(late))
    world.do(world.cut())
    assert not world.is_running(late)
    if passes == "after it":
        world.do(world.pass_deadline(late))
    if passes == "while the coordinator is away":
        world.do(world.pass_deadline(late))
        world.do(world.restart())
    world.do(world.kill_worker())
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]


@pytest.mark.parametrize("restarts", [False, True], ids=["lost", "lost, with the coordinator"])
def test_a_deadline_ends_what_had_not_begun_when_its_worker_was_lost(
    world: World, run: str, restarts: bool
):
    submit(world, run, GRADIENT)
    late = world.do(world.submit(run, deadline=True, **GRADIENT))
    submit(world, run, UPDATE)
    world.do(world.deliver())  # all of it is there, and none of it has begun
    assert world.do(world.pass_deadline(late))
    if restarts:
        world.do(world.restart())
    world.do(world.kill_worker())  # before it has answered
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "DEADLINE_EXCEEDED", "WINDOW_POISONED"]


def test_a_cancel_undoes_what_had_begun_when_its_worker_was_lost(world: World, run: str):
    [begun] = submit(world, run, GRADIENT)
    world.do(world.deliver())
    world.worker.begin()
    world.do(world.report())
    assert world.is_running(begun)
    world.do(world.cut())
    world.do(world.cancel(begun))
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    world.do(world.kill_worker())
    world.finish()
    expected = ["OPERATION_CANCELLED", "WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"]
    assert outcomes(world, run) == expected


@pytest.mark.parametrize("passed", [False, True], ids=["waiting", "passed over"])
@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("which", ["gradient", "update"])
def test_a_cancel_that_the_worker_has_made_stays_though_the_coordinator_has_forgotten_it(
    world: World, run: str, which: str, told: bool, passed: bool
):
    submit(world, run, GRADIENT, UPDATE)
    flow(world)  # so that the worker holds the run
    ids = submit(world, run, GRADIENT, UPDATE, GRADIENT, UPDATE)
    world.do(world.deliver())  # all of it is there, and none of it has begun
    world.do(world.cancel(ids[0 if which == "gradient" else 1]))
    world.do(world.deliver())
    if passed:
        world.worker.execute()
        world.worker.execute()
    if told:
        world.worker.report()  # the coordinator dies with it
    world.do(world.restart())
    world.finish()
    expected = {
        "gradient": ["OPERATION_CANCELLED", "WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"],
        "update": ["SUCCEEDED", "OPERATION_CANCELLED", "SUCCEEDED", "SUCCEEDED"],
    }
    assert outcomes(world, run)[2:] == expected[which]
    submit(world, run, GRADIENT, UPDATE)
    world.do(world.kill_worker())
    world.finish()
    assert outcomes(world, run)[6:] == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0


def test_a_gradient_that_failed_is_missing_from_its_window_and_from_its_replay(
    world: World, run: str
):
    submit(world, run, GRADIENT)
    flow(world)
    world.worker.backend.scarce["forward_backward"] = 1
    submit(world, run, GRADIENT, UPDATE, GRADIENT, UPDATE)
    flow(world, 10)
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    failed = ["OUT_OF_MEMORY", "WINDOW_POISONED"]
    assert outcomes(world, run) == ["SUCCEEDED", *failed, *["SUCCEEDED"] * 4]
    assert world.coordinator.replays.mismatches == 0


def test_an_update_that_failed_for_the_moment_does_not_succeed_when_it_is_replayed(
    world: World, run: str
):
    submit(world, run, GRADIENT)
    flow(world)
    world.worker.backend.scarce["optim_step"] = 1
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    flow(world, 10)
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "OUT_OF_MEMORY", *["SUCCEEDED"] * 4]
    assert [world.result(row).optim_step.step for row in world.rows(run)[3::2]] == [1, 2]
    assert world.coordinator.replays.mismatches == 0


def test_a_hole_is_sent_with_what_comes_behind_it(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    """Sent ahead, while that is still read from the store, it would be in a group of its own; and
    what is behind it may be placed into an earlier one."""
    plans: list[list[bool]] = []
    send_plan = WorkerLink.send_plan

    def send(link: WorkerLink, plan: Plan) -> None:
        plans.append([operation.void for operation in plan.operations if operation.group])
        send_plan(link, plan)

    submit(world, run, {"sample": sample(9)}, GRADIENT)
    flow(world)  # the sample runs on
    world.do(world.cut())
    world.do(world.send([world.next(run, forward_backward=forward_backward([])) for _ in "many"]))
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    world.do(world.restart())  # what waits is in the store only
    monkeypatch.setattr(WorkerLink, "send_plan", send)
    world.finish()
    assert any(any(holes) for holes in plans), "the hole was told"
    assert not any(holes and all(holes) for holes in plans)
    assert outcomes(world, run)[6:] == ["WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"]
