"""Courses of events in which something is tried anew: how often, and what is lost by it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World, sample
from google.rpc.status_pb2 import Status

from tensafe.v1 import training_pb2 as training
from tensafe.v1.worker_pb2 import OperationStarted, Plan, RefusedSnapshot, Report
from tensafe_server.fleet import dispatcher
from tensafe_server.fleet.link import WorkerLink


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
