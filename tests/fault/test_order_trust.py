"""Courses of events after which a worker and the log differ: who is believed."""

from __future__ import annotations

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World, forward_backward, sample


def test_whoever_ran_what_was_cancelled_meanwhile_is_not_believed(world: World, run: str):
    _, step = submit(world, run, GRADIENT, UPDATE)
    world.do(world.deliver())
    while world.worker.execute():
        pass  # it has stepped, and nobody has heard of it
    world.do(world.cut())
    world.do(world.cancel(step))
    submit(world, run, UPDATE, {"sample": sample(3)})
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "OPERATION_CANCELLED", "SUCCEEDED", "SUCCEEDED"]
    assert world.result(world.rows(run)[-1]).sample.model_step == 1


def test_whoever_is_back_is_asked_at_once_and_a_cancel_comes_too_late(world: World, run: str):
    _, step = submit(world, run, GRADIENT, UPDATE)
    world.do(world.deliver())
    while world.worker.execute():
        pass
    world.do(world.cut())
    world.worker.backend.credits = 0  # it takes nothing else
    world.do(world.connect())
    world.do(world.cancel(step))
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "SUCCEEDED"]


def test_nor_is_it_by_the_coordinator_after_that(world: World, run: str):
    submit(world, run, GRADIENT)
    flow(world)
    step = world.do(world.submit(run, **UPDATE))
    world.do(world.deliver())
    while world.worker.execute():
        pass  # it has stepped, and nobody has heard of it
    world.do(world.restart())
    world.do(world.cancel(step))
    world.do(world.restart())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "OPERATION_CANCELLED", "SUCCEEDED"]
    assert world.result(world.rows(run)[-1]).optim_step.step == 1


def test_an_outcome_of_an_earlier_assignment_does_not_end_what_was_sent_anew():
    """Else what comes behind it may join a group that is executed before it."""
    world = World(runs=1, workers=2)
    [run] = world.next_seq
    [drawn] = submit(world, run, {"sample": sample(2)})
    state = world.coordinator.ledger.runs[run]
    [at] = [at for at, host in enumerate(world.hosts) if host.link.id == state.worker_id]
    world.do(world.deliver(at))
    worker = world.hosts[at].worker
    while worker.execute() or worker.draw():
        pass  # it has ended, and nobody has heard of it
    world.do(world.fence(at))
    world.do(world.cut(1 - at))  # where the run is by now
    world.do(world.connect(at))
    link = world.hosts[at].link
    assert link is not None
    assert state.worker_id == link.id
    number = link.groups.number_of(drawn)
    assert number
    world.do(world.report(at))
    assert link.groups.number_of(drawn) == number
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]
    world.close()


def test_what_is_answered_twice_in_one_report_has_one_outcome(world: World):
    lane = world.do(world.submit_lane(2))
    world.do(world.deliver())
    while world.worker.execute() or world.worker.draw():
        pass  # it has ended, and nobody has heard of it
    world.do(world.restart())
    world.do(world.connect())
    world.do(world.deliver())  # it is sent again …
    while world.worker.execute():
        pass  # … and is answered again, behind the first answer
    world.do(world.report())
    assert world.store.outcomes[lane] == 1
    world.finish()
    assert [operation.id for operation in world.told()] == [lane]


@pytest.mark.parametrize("lost", ["the stream", "the coordinator"])
@pytest.mark.parametrize("done", [True, False], ids=["executed", "not begun"])
def test_what_a_worker_did_while_away_is_asked_for_before_others_take_its_memory(
    lost: str, done: bool
):
    world = World(runs=2)
    run, other = world.next_seq
    large = {"forward_backward": forward_backward(range(1, 200))}
    submit(world, run, large, UPDATE, large, UPDATE)
    world.do(world.deliver())
    while done and world.worker.execute():
        pass
    world.worker.report()  # is lost
    world.do(world.restart() if lost == "the coordinator" else world.cut())
    many = 2 * world.worker.backend.credits
    submit(world, other, *[GRADIENT, UPDATE] * many)  # each costs far less than one of the large
    world.do(world.connect())
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 4
    assert outcomes(world, other) == ["SUCCEEDED"] * 2 * many
    assert world.result(world.rows(run)[-1]).optim_step.step == 2
    world.close()


@pytest.mark.parametrize("executed", [True, False])
def test_whoever_has_what_a_torn_log_has_lost_is_not_believed(
    world: World, run: str, executed: bool
):
    """The disk had said that it was there, and the worker was sent it."""
    submit(world, run, GRADIENT, UPDATE)
    flow(world)
    [lost] = submit(world, run, GRADIENT)
    world.do(world.deliver())
    while executed and world.worker.execute():
        pass
    world.do(world.store._execute("DELETE FROM operations WHERE id = ?", (lost,)))
    world.do(world.restart())
    world.do(world.connect())
    world.next_seq[run] -= 1
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run)[2:] == ["EMPTY_WINDOW", "SUCCEEDED", "SUCCEEDED"]


@pytest.mark.parametrize("ended", [False, True], ids=["waiting", "cancelled"])
@pytest.mark.parametrize("lost", ["the last", "the one before it"])
def test_nor_is_it_once_the_lost_seq_was_used_again(world: World, run: str, lost: str, ended: bool):
    submit(world, run, GRADIENT, UPDATE)
    flow(world)
    ids = submit(world, run, GRADIENT, GRADIENT)
    world.do(world.deliver())
    while world.worker.execute():
        pass
    # What came ahead of a gap was written before what has filled it.
    at = {"the last": 1, "the one before it": 0}[lost]
    world.do(world.store._execute("DELETE FROM operations WHERE id = ?", (ids[at],)))
    world.do(world.restart())
    again = world.next(run, forward_backward=forward_backward((5, 6, 7)))
    again.seq, world.next_seq[run] = 3 + at, 5
    [outcome] = world.do(world.send([again]))
    if ended:
        world.do(world.cancel(outcome.operation_id))
    world.do(world.connect())
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    world.finish()
    expected = ["SUCCEEDED"] * 3
    if ended:
        expected[0] = "WINDOW_POISONED"
    assert outcomes(world, run)[4:] == expected
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run)[7:] == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0


def test_whoever_has_what_the_log_has_is_believed_however_much_of_it_was_not_told(
    world: World, run: str
):
    submit(world, run, GRADIENT, {"sample": sample(9)}, UPDATE, GRADIENT)
    flow(world)
    [cancelled, _] = submit(world, run, GRADIENT, UPDATE)
    world.do(world.deliver())
    world.do(world.cancel(cancelled))
    world.do(world.deliver())
    while world.worker.execute():
        pass
    epoch = world.coordinator.ledger.runs[run].epoch
    world.do(world.restart())
    world.do(world.connect())
    assert world.coordinator.ledger.runs[run].worker_id is not None
    world.finish()
    assert world.coordinator.ledger.runs[run].epoch == epoch, "nothing was replayed"


@pytest.mark.parametrize("of", ["a run", "no run"])
def test_nothing_is_taken_in_over_a_stream_that_is_fenced_off(world: World, run: str, of: str):
    """Also while nobody else has the run, and its assignment is the same."""
    if of == "a run":
        submit(world, run, GRADIENT)
    else:
        world.do(world.submit_lane(2))
    world.do(world.deliver())
    world.do(world.fence())
    while world.worker.execute() or world.worker.draw():
        pass
    world.do(world.report())
    assert not world.store.outcomes
    world.finish()
    assert list(world.store.outcomes.values()) == [1]


def test_a_stream_that_takes_the_place_of_another_is_no_loss(world: World, run: str):
    """The worker has noticed before the coordinator that the first was cut."""
    submit(world, run, GRADIENT)
    for kills in range(2):
        world.do(world.deliver())
        world.worker.begin()
        world.do(world.report())
        if not kills:
            world.do(world.kill_worker())  # one is held against it
    world.hosts[0].link = None
    world.do(world.connect())
    assert outcomes(world, run) == [], "it is not given up"
    world.do(world.kill_worker())
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]
