"""Snapshots on the worker's side: when they are due, and that training waits for no disk."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from unit.workers.planned import assignment, forward_backward, operation, plan
from unit.workers.test_executor import Driver, FolderTransfers

from tensafe.v1 import training_pb2
from workers.mock import MockBackend
from workers.snapshots import Debt, Snapshot, SnapshotPolicy, Snapshotter

OPTIM = {"optim_step": training_pb2.OptimStep()}


@pytest.mark.parametrize(
    ("policy", "due"),
    [
        (SnapshotPolicy(), False),
        (SnapshotPolicy(steps=3), True),
        (SnapshotPolicy(steps=4), False),
        (SnapshotPolicy(payload_bytes=100), True),
        (SnapshotPolicy(payload_bytes=101), False),
        (SnapshotPolicy(replay_s=2.0), True),
        (SnapshotPolicy(replay_s=2.1), False),
        (SnapshotPolicy(steps=9, payload_bytes=999, replay_s=2.0), True),
    ],
)
def test_each_measure_counts_by_itself(policy, due):
    debt = Debt(operations=6, steps=3, payload_bytes=100, replay_s=2.0)
    assert policy.due(debt) is due


@pytest.fixture
def transfers(tmp_path):
    return FolderTransfers(tmp_path)


@pytest.fixture
def driver(transfers):
    driver = Driver(MockBackend(), transfers)
    driver.executor.snapshots.policy = SnapshotPolicy(steps=2)
    yield driver
    driver.executor.close()


def updates(first: int, count: int, run: str = "run-1", **options):
    """`count` updates of one forward_backward each, from seq `first`."""
    return [
        item
        for number in range(count)
        for item in (
            operation(first + 2 * number, run, **forward_backward(), **options),
            operation(first + 2 * number + 1, run, **OPTIM, **options),
        )
    ]


def settled(driver: Driver) -> None:
    """Returns when what was captured is stored; makes no further snapshot."""
    assert driver.executor.snapshots.wait_stored(10)


def test_a_run_gets_one_after_so_many_applied_updates(driver, transfers):
    driver.run(*updates(1, 2), runs=[assignment()])
    settled(driver)
    assert transfers.snapshots == [("run-1", 1, 4, 2)]
    driver.run(*updates(5, 2))
    settled(driver)
    assert transfers.snapshots == [("run-1", 1, 4, 2), ("run-1", 1, 8, 4)]


def test_a_run_goes_on_from_one_elsewhere(driver, transfers):
    driver.run(*updates(1, 2), runs=[assignment()])
    settled(driver)
    moved = assignment(epoch=2)
    moved.snapshot_id, moved.seq = "snap-run-1-4", 4
    (passed, stepped) = driver.run(*updates(5, 1, epoch=2), runs=[moved])
    assert passed.result.forward_backward.metrics[0].value == 2.47
    assert stepped.result.optim_step.step == 3
    (held,) = driver.executor.held_runs()
    assert (held.epoch, held.last_seq) == (2, 6)


def test_one_that_cannot_be_loaded_is_refused_and_its_operations_left_alone(driver, transfers):
    driver.run(*updates(1, 2), runs=[assignment()])
    settled(driver)
    (transfers.root / "snap-run-1-4" / "state.json").write_text("{")
    moved = assignment(epoch=2)
    moved.snapshot_id, moved.seq = "snap-run-1-4", 4
    before = driver.run(*updates(5, 1, epoch=2), runs=[moved])
    assert before == [None, None]
    (refused,) = driver.executor.collect_refused()
    assert (refused.run_id, refused.epoch, refused.snapshot_id) == ("run-1", 2, "snap-run-1-4")
    assert driver.executor.held_runs() == []
    after = driver.run(*updates(1, 1, epoch=3), runs=[assignment(epoch=3)])
    assert after[1].result.optim_step.step == 1


@pytest.mark.parametrize(
    ("error", "useless"),
    [
        (OSError(errno.ENOSPC, "no space left on this worker's disk"), False),
        (MemoryError(), False),
        (FileNotFoundError(errno.ENOENT, "state.json"), True),
    ],
)
def test_what_this_machine_lacks_is_no_fault_of_the_snapshot(
    driver, transfers, monkeypatch, error, useless
):
    driver.run(*updates(1, 2), runs=[assignment()])
    settled(driver)

    def fetch(snapshot_id, directory):
        raise error

    monkeypatch.setattr(transfers, "fetch_snapshot", fetch)
    moved = assignment(epoch=2)
    moved.snapshot_id, moved.seq = "snap-run-1-4", 4
    driver.run(*updates(5, 1, epoch=2), runs=[moved])
    (refused,) = driver.executor.collect_refused()
    assert (refused.run_id, refused.epoch) == ("run-1", 2)
    assert refused.snapshot_id == ("snap-run-1-4" if useless else "")


def test_the_copy_of_a_check_gets_none_and_is_not_held(driver, transfers):
    check = assignment("check-1")
    check.check = True
    operations = updates(1, 3)
    for item in operations:
        item.run_id, item.replay = "check-1", True
    outcomes = driver.run(*operations, runs=[check])
    settled(driver)
    assert {outcome.run_id for outcome in outcomes} == {"check-1"}
    assert transfers.snapshots == []
    assert driver.executor.held_runs() == []


def test_a_saved_state_counts_as_one(driver, transfers):
    save = operation(3, save_state=training_pb2.SaveState(), artifact_id="art-1")
    driver.run(*updates(1, 1), save, *updates(4, 1), runs=[assignment()])
    settled(driver)
    assert transfers.snapshots == []


def test_one_that_was_not_kept_is_made_up_for(driver, transfers, monkeypatch):
    monkeypatch.setattr("workers.keeping._UNKEPT_PAUSE_S", 0.0)
    transfers.refusal = "not now"
    driver.run(*updates(1, 2), runs=[assignment()])
    settled(driver)
    transfers.refusal = None
    driver.run(*updates(5, 1))
    settled(driver)
    assert [seq for _, _, seq, _ in transfers.snapshots] == [4, 6]


def test_flushing_stores_what_has_moved(driver, transfers):
    driver.run(*updates(1, 1), *updates(1, 1, "run-2"), runs=[assignment(), assignment("run-2")])
    assert driver.executor.flush_snapshots(10)
    assert sorted(transfers.snapshots) == [("run-1", 1, 2, 1), ("run-2", 1, 2, 1)]
    assert driver.executor.flush_snapshots(10)
    assert len(transfers.snapshots) == 2


@dataclass
class Held:
    """A state whose writing waits for the test."""

    step: int
    gate: threading.Event

    def write(self, directory: Path) -> None:
        assert self.gate.wait(10)
        (directory / "state.json").write_text(str(self.step))


def test_training_does_not_wait_and_the_newest_wins(transfers):
    gate = threading.Event()
    begun = threading.Event()

    class Slow(MockBackend):
        def capture(self, run_id):
            begun.set()
            return Held(super().capture(run_id).step, gate)

    driver = Driver(Slow(), transfers)
    driver.executor.snapshots.policy = SnapshotPolicy(steps=1)
    driver.executor.submit(plan(*updates(1, 1), runs=[assignment()]))
    assert begun.wait(10)
    outcomes = driver.run(*updates(3, 5))  # while the first one is being written
    assert outcomes[-1].result.optim_step.step == 6
    gate.set()
    settled(driver)
    driver.executor.close()
    steps = [step for *_, step in transfers.snapshots]
    assert steps[-1] == 6
    assert len(steps) <= 3


def test_the_debt_of_what_was_overtaken_is_not_lost():
    unkept: list[Snapshot] = []

    class Refusing:
        def upload_snapshot(self, *_):
            return "no"

    gate = threading.Event()
    gate.set()
    snapshotter = Snapshotter(Refusing(), unkept.append)
    for seq in (2, 4):
        snapshotter.put(Snapshot("run-1", 1, seq, Held(1, gate), Debt(2, 1, 10, 0.5)))
    snapshotter.start()
    assert snapshotter.wait_idle(10)
    snapshotter.close()
    assert [one.debt for one in unkept] == [Debt(4, 2, 20, 1.0)]
