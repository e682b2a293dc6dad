"""Private runs between a coordinator's plans and a backend: charges, and when updates are told."""

from __future__ import annotations

import errno
import threading

import grpc
import numpy as np
import pytest
from unit.workers.planned import assignment, batch, forward_backward, operation, plan
from unit.workers.test_executor import Driver, FolderTransfers, reason

from tensafe.v1 import privacy_pb2, training_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import encode
from workers import private_steps
from workers.mock import MockBackend, MockCaptured
from workers.snapshots import SnapshotPolicy

DP = privacy_pb2.DpConfig(
    enabled=True, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4.0
)
OPTIM = {"optim_step": training_pb2.OptimStep()}


class StateTransfers(FolderTransfers):
    """Keeps the states after private updates; stores them only while the gate is open."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self.stored: list[tuple] = []
        self.failures: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pieces: dict[str, list] = {}

    def upload_private_step(self, run_id, epoch, seq, step, charge_id, directory) -> str:
        assert self.gate.wait(10)
        if self.failures:
            raise self.failures.pop()
        self.stored.append((run_id, epoch, seq, step, charge_id))
        return f"snap-{run_id}-{seq}"

    def fetch_private_batch(self, operation_id, charge_id):
        return self.pieces[charge_id]


@pytest.fixture
def transfers(tmp_path):
    return StateTransfers(tmp_path)


@pytest.fixture
def driver(transfers, monkeypatch):
    monkeypatch.setattr(private_steps, "_FIRST_PAUSE_S", 0.01)
    driver = Driver(MockBackend(), transfers)
    yield driver
    transfers.gate.set()
    driver.executor.close()


def charged(seq: int, run: str = "run-1", **options):
    charge = worker_pb2.Charge(id=f"chg-{run}-{seq}", ledger_position=seq)
    return operation(seq, run, **(OPTIM | {"charge": charge} | options))


def gradient(seq: int, run: str = "run-1", **options):
    return operation(seq, run, **forward_backward(), **options)


def unreachable() -> Exception:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)


def give_up_at_once(monkeypatch) -> None:
    monkeypatch.setattr(private_steps, "_GIVE_UP_S", 0.0)
    monkeypatch.setattr(private_steps, "_LEAST_TRIES", 1)


def private(run: str = "run-1", **config):
    return assignment(run, dp=DP, **config)


def test_an_update_is_told_when_the_state_after_it_is_stored(driver, transfers):
    (_, done) = driver.run(gradient(1), charged(2), runs=[private()])
    assert done.result.optim_step.step == 1
    assert done.snapshot_id == "snap-run-1-2"
    assert not done.charge_unused
    assert transfers.stored == [("run-1", 1, 2, 1, "chg-run-1-2")]
    assert done.result.optim_step.dp == privacy_pb2.DpMetrics()  # the mock adds no noise


def test_until_then_the_worker_goes_on_and_tells_nothing_of_the_run(driver, transfers):
    transfers.gate.clear()
    driver.executor.submit(
        plan(
            *(gradient(1), charged(2), gradient(3)),
            gradient(1, "run-2"),
            runs=[private(), assignment("run-2")],
        )
    )
    driver.until(lambda: "op-run-2-1" in driver.done)
    assert list(driver.done) == ["op-run-1-1", "op-run-2-1"]
    assert not driver.executor.idle
    # Sent again over a new stream, it is not executed again, and answered once it is stored.
    driver.executor.new_stream()
    driver.executor.submit(plan(charged(2), gradient(3), gradient(2, "run-2"), runs=[private()]))
    driver.until(lambda: "op-run-2-2" in driver.done)
    assert "op-run-1-2" not in driver.done
    transfers.gate.set()
    driver.until(lambda: driver.executor.idle)
    assert list(driver.done)[-2:] == ["op-run-1-2", "op-run-1-3"]
    assert driver.done["op-run-1-2"].snapshot_id == "snap-run-1-2"
    assert driver.executor._backend._runs["run-1"].window.step == 1
    # From now on it is answered from memory.
    driver.done.clear()
    (again,) = driver.run(charged(2))
    assert again.result.optim_step.step == 1
    assert len(transfers.stored) == 1


def test_the_next_update_waits_for_the_last_one(driver, transfers):
    transfers.gate.clear()
    driver.executor.submit(plan(gradient(1), charged(2), charged(3), runs=[private()]))
    driver.executor.submit(plan(gradient(1, "run-2"), runs=[assignment("run-2")]))
    driver.until(lambda: "op-run-2-1" in driver.done)
    transfers.gate.set()
    driver.until(lambda: driver.executor.idle)
    assert reason(driver.done["op-run-1-3"]) == "INTERNAL"
    assert driver.executor._backend._runs["run-1"].window.step == 1


def test_a_state_that_cannot_be_stored_at_once_is_tried_again(driver, transfers):
    stale = TenSafeFault("STALE_ASSIGNMENT", "not now")
    transfers.failures += [OSError("disk"), stale, RuntimeError("wire")]
    (_, done) = driver.run(gradient(1), charged(2), runs=[private()])
    assert done.snapshot_id == "snap-run-1-2"
    assert not transfers.failures


def test_a_state_that_is_never_wanted_gives_the_run_back(driver, transfers, monkeypatch):
    give_up_at_once(monkeypatch)
    transfers.failures += [TenSafeFault("STALE_ASSIGNMENT", "run moved")]
    outcomes = driver.run(gradient(1), charged(2), gradient(3), runs=[private()])
    assert outcomes[0] is not None
    assert outcomes[1:] == [None, None]
    (refused,) = driver.executor.collect_refused()
    assert (refused.run_id, refused.epoch, refused.snapshot_id) == ("run-1", 1, "")
    assert not driver.executor.held_runs()
    (done,) = driver.run(gradient(1, epoch=2), runs=[private(epoch=2)])
    assert done.HasField("result")


def test_a_full_disk_of_this_machine_gives_the_run_back(driver, transfers, monkeypatch):
    """Another worker can make the update, if this one gets no room."""
    give_up_at_once(monkeypatch)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("workers.mock.MockCaptured.write", full)
    outcomes = driver.run(gradient(1), charged(2), runs=[private()])
    assert outcomes[1] is None
    (refused,) = driver.executor.collect_refused()
    assert "could not be stored" in refused.error.message
    assert not driver.executor.held_runs()


def test_a_coordinator_that_cannot_be_reached_or_write_is_waited_for(
    driver, transfers, monkeypatch
):
    give_up_at_once(monkeypatch)
    away = unreachable()
    full = TenSafeFault("STORAGE_FULL", "the coordinator's disk is full")
    transfers.failures += [away, full, away]
    (_, done) = driver.run(gradient(1), charged(2), runs=[private()])
    assert done.snapshot_id == "snap-run-1-2"


@pytest.fixture
def goes_on(transfers, monkeypatch):
    """Whether a step is tried again that fails at a time."""
    now = [0.0]
    monkeypatch.setattr(private_steps.time, "monotonic", lambda: now[0])
    steps = private_steps.PrivateSteps(transfers, lambda step: None)
    spec = training_pb2.OperationSpec(run_id="run-1", seq=2)
    ended = private_steps.Ended(spec, charged(2), worker_pb2.OperationDone())
    step = private_steps.PrivateStep(ended, MockCaptured(1, ""))

    def fail(at_s: float, error: Exception) -> bool:
        now[0] = at_s
        return steps._again(step, error)

    return fail


OWN = OSError(errno.ENOSPC, "full")


def test_two_minutes_of_own_failures_in_a_row_are_enough(goes_on):
    """After the coordinator was away, however long, they are counted anew."""
    assert all(goes_on(at_s, OWN) for at_s in (0, 1, 2, 3, 4, 119))
    assert all(goes_on(at_s, unreachable()) for at_s in (200, 900))
    assert all(goes_on(at_s, OWN) for at_s in (901, 902, 903, 904, 1020))
    assert not goes_on(1022, OWN)


def test_tries_that_take_long_are_at_least_a_handful(goes_on):
    assert [goes_on(at_s, OWN) for at_s in (0, 60, 130, 200, 270)] == [True] * 4 + [False]


def test_a_run_that_is_taken_away_takes_what_waits_with_it(driver, transfers):
    transfers.gate.clear()
    driver.executor.submit(plan(gradient(1), charged(2), runs=[private()]))
    driver.executor.release("run-1")
    driver.until(lambda: driver.executor.idle)
    transfers.gate.set()
    (done,) = driver.run(gradient(1, epoch=2), runs=[private(epoch=2)])
    assert done.HasField("result")
    assert "op-run-1-2" not in driver.done


def test_a_charge_is_given_back_where_nothing_was_noised(driver):
    driver.run(gradient(1), runs=[private(gradient_accumulation_steps=2)])
    outcomes = [driver.run(charged(seq))[0] for seq in (2, 3, 4, 5)]
    assert [done.result.optim_step.applied for done in outcomes] == [False, True, False, True]
    assert [done.charge_unused for done in outcomes] == [True, False, True, False]
    bad = {"forward_backward": training_pb2.ForwardBackward(batch=batch(weights=np.zeros(3, "f4")))}
    poisoned = driver.run(operation(6, **bad), charged(7), charged(8))
    assert reason(poisoned[2]) == "WINDOW_POISONED"
    assert poisoned[2].charge_unused


class BriefBackend(MockBackend):
    """Has little to remember."""

    credits = 2


def test_other_runs_do_not_take_the_place_of_what_a_private_run_is_asked_for(transfers):
    driver = Driver(BriefBackend(), transfers)
    try:
        both = [private(), assignment("run-2")]
        told = driver.run(gradient(1), charged(2), runs=both)  # and nobody hears of it
        others = [operation(seq, "run-2", **forward_backward()) for seq in range(1, 9)]
        driver.run(*others)
        assert driver.run(gradient(1), charged(2)) == told
        # Not under its next assignment, whose operations are executed anew.
        (anew,) = driver.run(gradient(1, epoch=2), runs=[private(epoch=2)])
        assert (anew.epoch, anew.HasField("result")) == (2, True)
    finally:
        driver.executor.close()


def test_what_was_cancelled_of_a_private_run_stays_so(transfers):
    driver = Driver(BriefBackend(), transfers)
    try:
        driver.run(gradient(1), runs=[private(), assignment("run-2")])
        waiting = gradient(2)
        driver.executor._progress.expect([waiting])
        driver.executor.cancel(waiting.operation_id)
        driver.run(*[operation(seq, "run-2", **forward_backward()) for seq in range(1, 9)])
        (again,) = driver.run(waiting)
        assert again.cancelled
    finally:
        driver.executor.close()


def test_an_update_without_a_charge_is_never_made(driver):
    assert reason(driver.run(gradient(1), operation(2, **OPTIM), runs=[private()])[1]) == "INTERNAL"
    window = driver.executor._backend._runs["run-1"].window
    assert (window.step, window.backwards) == (0, 0), "closed, as a replay has it"
    (done,) = driver.run(charged(3))
    assert done.result.optim_step.applied


def test_a_replay_counts_calls_and_updates_nothing(driver):
    replay = {"replay": True}
    driver.run(
        gradient(1, **replay),
        operation(2, **OPTIM, **replay),
        gradient(3, **replay),
        operation(4, **OPTIM, **replay, failed=True),  # for want of a charge, as now
        runs=[private(gradient_accumulation_steps=2)],
    )
    window = driver.executor._backend._runs["run-1"].window
    assert (window.step, window.calls, window.backwards) == (0, 1, 2)


def test_a_step_that_was_lost_closes_its_window(driver):
    driver.run(gradient(1), operation(2, **OPTIM, void=True), runs=[private()])
    window = driver.executor._backend._runs["run-1"].window
    assert (window.backwards, window.calls, window.poisoned) == (0, 0, False)
    driver.run(operation(3, **forward_backward(), void=True), charged(4))
    assert reason(driver.done["op-run-1-4"]) == "WINDOW_POISONED"


def test_a_private_step_is_a_whole_window(driver, transfers):
    piece = worker_pb2.FetchPrivateBatchResponse(
        batch=batch().inline, units=encode(np.array([0, 0], np.int32))
    )
    transfers.pieces = {"chg-run-1-1": [piece, piece], "chg-run-1-2": []}
    step = {"private_step": training_pb2.PrivateStep(learning_rate=0.5)}
    driver.run(runs=[private(gradient_accumulation_steps=3)])
    outcomes = [driver.run(charged(seq, optim_step=None, **step))[0] for seq in (1, 2)]
    assert [done.result.optim_step.step for done in outcomes] == [1, 2]
    assert [done.result.optim_step.learning_rate for done in outcomes] == [0.5, 0.5]
    assert [done.snapshot_id for done in outcomes] == ["snap-run-1-1", "snap-run-1-2"]


def test_private_runs_have_no_other_snapshots(driver, transfers):
    driver.executor.snapshots.policy = SnapshotPolicy(steps=1)
    driver.run(gradient(1), charged(2), gradient(3), runs=[private()])
    assert driver.executor.flush_snapshots(5.0)
    assert not transfers.snapshots


def test_updates_of_private_and_other_runs_are_told_apart(driver, transfers):
    transfers.gate.clear()
    driver.executor.submit(
        plan(
            gradient(1, group=1),
            gradient(1, "run-2", group=1),
            charged(2, group=2),
            operation(2, "run-2", **OPTIM, group=2),
            runs=[private(), assignment("run-2")],
        )
    )
    driver.until(lambda: "op-run-2-2" in driver.done)
    assert "op-run-1-2" not in driver.done
    transfers.gate.set()
    driver.until(lambda: "op-run-1-2" in driver.done)
    assert driver.done["op-run-1-2"].snapshot_id
    assert not driver.done["op-run-2-2"].snapshot_id


def test_weights_are_not_sampled_before_the_update_that_made_them_is_stored(driver, transfers):
    prompt = training_pb2.Prompt(text="hello")
    transfers.gate.clear()
    driver.executor.submit(
        plan(
            *(gradient(1), charged(2)),
            operation(3, sample=training_pb2.Sample(prompts=[prompt])),
            runs=[private()],
        )
    )
    driver.until(lambda: "op-run-1-1" in driver.done)
    assert list(driver.done) == ["op-run-1-1"]
    transfers.gate.set()
    driver.until(lambda: driver.executor.idle)
    assert driver.done["op-run-1-2"].snapshot_id == "snap-run-1-2"
    assert driver.done["op-run-1-3"].result.sample.model_step == 1
