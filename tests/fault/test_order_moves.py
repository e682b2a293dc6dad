"""Single courses of events that the machine of random moves would seldom make."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pytest
from fault.order_world import World, forward_backward, sample
from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.worker_pb2 import OperationStarted, Plan, RefusedSnapshot, Report
from tensafe.wire.status import from_status
from tensafe_server.fleet import dispatcher
from tensafe_server.fleet.link import WorkerLink

GRADIENT: dict[str, Any] = {"forward_backward": forward_backward()}
UPDATE: dict[str, Any] = {"optim_step": training.OptimStep()}


def submit(world: World, run: str, *operations: dict[str, Any]) -> list[str]:
    return [world.do(world.submit(run, **operation)) for operation in operations]


def flow(world: World, times: int = 8) -> None:
    """Everything goes on but the drawing of tokens."""
    for _ in range(times):
        world.do(world.deliver())
        world.worker.execute()
        world.do(world.report())


def outcomes(world: World, run: str) -> list[str]:
    """SUCCEEDED, or the reason, of each of a run's operations."""
    return [
        from_status(Status.FromString(row.error)).reason
        if row.error
        else ops.OperationState.Name(row.state).removeprefix("OPERATION_STATE_")
        for row in world.rows(run)
    ]


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


def test_a_sample_whose_weights_are_lost_fails_alone(world: World, run: str):
    for _ in range(2):
        submit(world, run, GRADIENT, UPDATE)
        flow(world)
        assert world.do(world.snapshot(run)) is None
    [drawn] = submit(world, run, {"sample": sample(9)})
    submit(world, run, GRADIENT, UPDATE)
    flow(world)
    assert world.do(world.snapshot(run)) is None
    world.do(world.prune(run))
    rows = world.do(world.store.snapshots(run))
    assert [row.seq for row in rows] == [7, 4, 2]  # the sample has seq 5
    for row in rows[1:]:
        (world.home / "blobs" / "snapshots" / row.id / "state.json").write_text("torn")
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE, {"sample": sample(2)})
    world.finish()
    [lost] = [row for row in world.rows(run) if row.id == drawn]
    assert outcomes(world, run)[4] == "RUN_STATE_LOST"
    assert "The run itself goes on" in Status.FromString(lost.error or b"").message
    assert [one for one in outcomes(world, run) if one != "SUCCEEDED"] == ["RUN_STATE_LOST"]
    assert world.result(world.rows(run)[-1]).sample.model_step == 4


def test_a_sample_that_is_beside_everything_outlives_three_workers_and_not_a_fourth(
    world: World, run: str
):
    submit(world, run, {"sample": sample(9)})
    for _ in range(3):
        flow(world, 2)
        assert world.worker.draw()
        world.do(world.kill_worker())
    flow(world, 2)
    assert world.coordinator.ledger.unfinished == 1
    world.do(world.kill_worker())
    assert outcomes(world, run) == ["INTERNAL"]


def test_what_crashes_beside_a_sample_is_found_and_the_sample_is_not_blamed(world: World, run: str):
    submit(world, run, {"sample": sample(9)})
    flow(world, 2)
    submit(world, run, GRADIENT)
    for _ in range(3):  # the worker dies before it has said that it began
        world.do(world.deliver())
        world.do(world.kill_worker())
        flow(world, 2)  # the sample runs again, and is told of
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED", "INTERNAL"]


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


def test_what_takes_the_coordinator_with_it_before_anyone_is_told_is_tried_four_times(
    world: World, run: str
):
    submit(world, run, GRADIENT)
    tries = 0
    while world.coordinator.ledger.unfinished:
        assert world.do(world.deliver()), "nobody is at it"
        world.worker.begin()
        tries += 1
        assert tries < 10
        world.do(world.restart())
        world.do(world.kill_worker())
        world.do(world.judge())
    assert tries == 4  # the first time that a run is sent out, nothing of it is on disk
    submit(world, run, UPDATE, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["INTERNAL", "WINDOW_POISONED", "SUCCEEDED", "SUCCEEDED"]


def test_before_a_run_is_sent_out_anew_it_is_on_disk_that_it_is(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    on_disk: list[list[tuple[str]]] = []
    send_plan = WorkerLink.send_plan

    def send(link: WorkerLink, plan: Plan) -> None:
        with closing(sqlite3.connect(world.home / "store.db")) as connection:
            on_disk.append(connection.execute("SELECT subject FROM attempts").fetchall())
        send_plan(link, plan)

    monkeypatch.setattr(WorkerLink, "send_plan", send)
    submit(world, run, GRADIENT, UPDATE)
    assert on_disk.pop(0) == []  # the first time
    flow(world)
    submit(world, run, GRADIENT)
    on_disk.clear()
    world.do(world.kill_worker())
    assert (run,) in on_disk[0]
    flow(world)
    assert outcomes(world, run) == ["SUCCEEDED"] * 3
    assert world.do(world.store.attempts()) == []


def test_what_is_begun_is_on_disk_before_its_run_is_forgotten(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    submit(world, run, GRADIENT)
    world.do(world.kill_worker())  # so that the run is on its way
    writes: list[str] = []
    for name in ("add_attempts", "remove_attempts"):
        _note_calls(monkeypatch, world.store, name, writes)
    world.do(world.deliver())
    world.worker.begin()
    world.do(world.report())
    assert writes == ["add_attempts", "remove_attempts"]
    world.do(world.kill_worker())
    world.finish()


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


@pytest.mark.usefixtures("no_rest")
@pytest.mark.parametrize("scarce", ["open_run", "forward_backward"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_does_not_come_to_its_log_is_brought_anew(
    world: World, run: str, scarce: str, times: int
):
    submit(world, run, GRADIENT, UPDATE, GRADIENT, UPDATE, GRADIENT)
    flow(world, 10)
    world.do(world.kill_worker())
    world.worker.backend.scarce[scarce] = times
    submit(world, run, UPDATE, {"sample": sample(1)})
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 7
    assert [world.result(row).optim_step.step for row in world.rows(run)] == [0, 1, 0, 2, 0, 3, 0]
    assert world.coordinator.replays.mismatches == 0


@pytest.mark.usefixtures("no_rest")
@pytest.mark.parametrize("scarce", ["open_run", "forward_backward"])
def test_what_waits_fails_if_its_run_never_comes_to_its_log_and_the_run_is_as_it_was(
    world: World, run: str, scarce: str
):
    submit(world, run, GRADIENT, UPDATE, GRADIENT)
    flow(world)
    world.do(world.kill_worker())
    world.worker.backend.scarce[scarce] = 4
    [failed] = submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run)[3:] == ["OUT_OF_MEMORY"]
    [row] = [row for row in world.rows(run) if row.id == failed]
    assert "3 times" in Status.FromString(row.error or b"").message
    submit(world, run, UPDATE)  # is tried once more, and the fourth time is the last
    world.finish()
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run)[3:] == ["OUT_OF_MEMORY", "OUT_OF_MEMORY", "SUCCEEDED"]
    assert world.result(world.rows(run)[-1]).optim_step.step == 2


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


@pytest.mark.usefixtures("no_rest")
@pytest.mark.parametrize("operation", [GRADIENT, UPDATE], ids=["gradient", "update"])
def test_a_run_whose_order_its_worker_has_left_is_brought_anew(
    world: World, run: str, operation: dict[str, Any]
):
    submit(world, run, GRADIENT, UPDATE, GRADIENT)
    flow(world)
    world.worker.executor._runs[run].last_seq = 4
    submit(world, run, operation, UPDATE, GRADIENT, UPDATE)
    world.finish()
    first = "SUCCEEDED" if operation is GRADIENT else "EMPTY_WINDOW"
    assert outcomes(world, run)[3:] == ["SUCCEEDED", first, "SUCCEEDED", "SUCCEEDED"]


@pytest.mark.usefixtures("no_rest")
def test_whoever_gave_a_run_up_gets_it_again_only_if_there_is_nobody_else():
    """A worker that takes nothing on holds the fewest runs."""
    world = World(runs=3, workers=2)
    sick = world.hosts[0]
    sick.worker.backend.scarce["open_run"] = 1000
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE, GRADIENT)
    world.finish()
    world.do(world.kill_worker(1))
    for run in world.next_seq:
        submit(world, run, UPDATE)
    world.finish()
    assert [outcomes(world, run) for run in world.next_seq] == [["SUCCEEDED"] * 4] * 3
    assert sick.worker.backend.scarce["open_run"] < 1000, "it was tried"
    world.close()


@pytest.mark.usefixtures("no_rest")
def test_a_run_may_be_given_up_again_once_it_has_gone_on(world: World, run: str):
    for _ in range(3):
        submit(world, run, GRADIENT, UPDATE)
        world.finish()
        world.do(world.kill_worker())
        world.worker.backend.scarce["open_run"] = 2
    world.finish()
    submit(world, run, GRADIENT)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 7


def test_a_save_whose_files_a_backup_does_not_have_is_made_anew(world: World, run: str):
    """Its worker remembers that it has made it."""
    submit(world, run, GRADIENT, UPDATE, {"save_state": training.SaveState()}, GRADIENT)
    world.do(world.back_up())
    world.do(world.deliver())
    while world.worker.execute():
        pass
    assert world.do(world.put_back())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 5
    artifact = world.result(world.rows(run)[2]).save_state.artifact
    folder = world.home / "blobs" / "artifacts" / artifact.id
    assert sorted(path.name for path in folder.iterdir()) == [file.name for file in artifact.files]
    assert world.result(world.rows(run)[-1]).optim_step.step == 2
    submit(world, run, {"load_state": training.LoadState(artifact_id=artifact.id)})
    world.finish()
    assert outcomes(world, run)[5:] == ["SUCCEEDED"]
    assert world.coordinator.replays.mismatches == 0


@pytest.mark.usefixtures("no_rest")
def test_to_begin_is_not_to_go_on(world: World, run: str):
    """What loses its run each time that it begins is not tried for ever."""
    [operation] = submit(world, run, GRADIENT)
    for _ in range(3):
        world.do(world.deliver())
        epoch = world.coordinator.ledger.runs[run].epoch
        begun = OperationStarted(operation_id=operation, epoch=epoch)
        refused = RefusedSnapshot(run_id=run, epoch=epoch, error=Status(code=13, message="?"))
        assert world.link is not None
        world.do(world.coordinator.reception.report(world.link, Report(started=[begun])))
        world.do(world.coordinator.reception.report(world.link, Report(refused=[refused])))
    assert outcomes(world, run) == ["INTERNAL"]


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


@pytest.mark.usefixtures("no_rest")
def test_a_run_that_is_given_up_for_an_unknown_reason_is_brought_anew(world: World, run: str):
    submit(world, run, GRADIENT)
    world.do(world.deliver())
    epoch = world.coordinator.ledger.runs[run].epoch
    refused = RefusedSnapshot(run_id=run, epoch=epoch, error=Status(code=13, message="?"))
    assert world.link is not None
    world.do(world.coordinator.reception.report(world.link, Report(refused=[refused])))
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"]
    assert world.coordinator.ledger.runs[run].epoch == epoch + 1


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was given up is tried again at once."""
    monkeypatch.setattr(dispatcher, "_RETRY_S", 0.0)


def _note_calls(monkeypatch: pytest.MonkeyPatch, store: Any, name: str, calls: list[str]) -> None:
    write = getattr(store, name)

    def noted(what: Any) -> Any:
        calls.append(name)
        return write(what)

    monkeypatch.setattr(store, name, noted)


def test_what_is_coming_is_asked_only_where_a_run_is_to_be_brought(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    """It takes a look at every run of a worker, which may hold a thousand."""
    asked: list[str] = []
    blame = world.coordinator.dispatcher._blame
    arrivals = blame.arrivals
    monkeypatch.setattr(blame, "arrivals", lambda link: (asked.append(link.id), arrivals(link))[1])
    submit(world, run, GRADIENT)
    flow(world)
    asked.clear()
    submit(world, run, UPDATE)
    flow(world)
    assert outcomes(world, run) == ["SUCCEEDED"] * 2
    assert not asked
    world.do(world.kill_worker())
    submit(world, run, GRADIENT)
    world.finish()
    assert asked
