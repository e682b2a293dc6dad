"""Operations and runs that take their workers with them: found out, and ended by themselves.

However often the coordinator starts anew meanwhile, also together with the workers.
"""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.cluster import Process
from harness.faulty_fleet import TIMEOUT_S, FaultyCluster, batch, train
from harness.faulty_worker import CRASH, CRASH_LATER, GATE, HANG, HANG_WITH_LOCK

from tensafe_client import OperationFuture

NOT_TRIED_AGAIN = "when its worker was lost, so it is not tried again"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FaultyCluster]:
    with FaultyCluster(tmp_path, "--worker-silence-s", "3", "--grace-s", "5") as cluster:
        cluster.start()
        yield cluster


def attempts(fleet: FaultyCluster) -> list[tuple[str, int]]:
    """(subject, 1 if it had begun) of everything that workers are at, as it is on disk."""
    connection = sqlite3.connect(fleet.data / "tensafe.db")
    try:
        return connection.execute("SELECT subject, running FROM attempts").fetchall()
    finally:
        connection.close()


def wait_recorded(fleet: FaultyCluster, future: OperationFuture, workers: int = 1) -> None:
    """Returns when it is on disk that so many workers have begun the operation."""
    while attempts(fleet).count((future.operation_id or "", 1)) < workers:
        assert not future.done()


def wait_counted(fleet: FaultyCluster, future: OperationFuture, losses: int) -> None:
    """Returns when so many losses are on disk against the operation, or it has ended by them."""
    while [subject for subject, _ in attempts(fleet)].count(future.operation_id or "") < losses:
        if future.done():
            return


def reason(future: OperationFuture) -> str:
    error = future.exception(TIMEOUT_S)
    assert error is not None
    return str(error.reason)  # type: ignore[attr-defined]


def restart(process: Process) -> None:
    process.kill()
    process.start()
    process.wait_ready()


@pytest.mark.parametrize(
    ("mark", "status", "said"),
    [
        (HANG, 75, "hang_for_ever"),
        (HANG_WITH_LOCK, 1, "act_on"),
        (CRASH, -signal.SIGKILL, "connected to"),
    ],
    ids=["hang", "hang-with-lock", "crash"],
)
def test_a_poison_operation_fails_by_itself_after_two_workers(
    fleet: FaultyCluster, mark: int, status: int, said: str
):
    limits = ("--operation-limit-s", "1", "--token-limit-ms", "0")
    with fleet.client() as client:
        for _ in range(2):
            fleet.add_faulty_worker(*limits)
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        assert train(tc, 1)
        other = client.create_training_client({"model_ref": "any", "seed": 3})
        assert train(other, 1)
        poison = tc.forward_backward(batch(mark))
        closing = tc.optim_step()
        deaths = 0
        while (death := fleet.next_death(unless=poison)) is not None:
            dead, ended_with = death
            assert ended_with == status, dead.log[-2000:]
            dead.wait_said(said)
            fleet.revive(dead)
            deaths += 1
        assert deaths in (2, 3)  # a crash may be faster than the news that it began
        assert reason(poison) == "INTERNAL"
        assert NOT_TRIED_AGAIN in str(poison.exception())
        assert reason(closing) == "WINDOW_POISONED"
        assert [step for step, _ in train(tc, 2)] == [2, 3]
        assert [step for step, _ in train(other, 2)] == [2, 3]
        assert attempts(fleet) == []


@pytest.mark.parametrize(
    "mark",
    [pytest.param(CRASH, id="crash"), pytest.param(HANG, id="hang", marks=pytest.mark.slow)],
)
def test_a_coordinator_that_dies_between_its_workers_goes_on_counting(
    fleet: FaultyCluster, mark: int
):
    with fleet.client() as client:
        fleet.add_faulty_worker("--operation-limit-s", "1", "--token-limit-ms", "0")
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        assert train(tc, 1)
        poison = tc.forward_backward(batch(mark))
        closing = tc.optim_step()
        deaths = 0
        while (death := fleet.next_death(unless=poison)) is not None:
            deaths += 1
            fleet.coordinator.wait_said(" left; it held 1 runs", count=deaths)
            wait_counted(fleet, poison, deaths)
            restart(fleet.coordinator)
            fleet.revive(death[0])
        assert deaths in (2, 3)
        assert reason(poison) == "INTERNAL"
        assert NOT_TRIED_AGAIN in str(poison.exception())
        assert reason(closing) == "WINDOW_POISONED"
        assert [step for step, _ in train(tc, 2)] == [2, 3]
        assert attempts(fleet) == []


@pytest.mark.slow
def test_what_takes_the_coordinator_with_it_is_tried_twice(fleet: FaultyCluster):
    """As on one machine that runs out of memory: nobody is left to see the worker's end."""
    with fleet.client() as client:
        worker = fleet.add_faulty_worker()
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        assert train(tc, 1)
        poison = tc.forward_backward(batch(GATE))
        for tries in (1, 2):
            wait_recorded(fleet, poison, tries)
            fleet.coordinator.kill()
            worker.kill()
            fleet.coordinator.start()
            fleet.coordinator.wait_ready()
            fleet.revive(worker)
        assert reason(poison) == "INTERNAL"
        assert NOT_TRIED_AGAIN in str(poison.exception())
        assert reason(tc.optim_step()) == "WINDOW_POISONED"
        assert [step for step, _ in train(tc, 2)] == [2, 3]
        assert attempts(fleet) == []


@pytest.mark.slow
def test_a_worker_that_outlives_the_coordinator_is_not_counted(fleet: FaultyCluster):
    with fleet.client() as client:
        worker = fleet.add_faulty_worker()
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        assert train(tc, 1)
        waiting = tc.forward_backward(batch(GATE))
        wait_recorded(fleet, waiting)
        worker.kill()  # the one loss that it may have
        fleet.coordinator.wait_said(" left; it held 1 runs")
        fleet.revive(worker)
        for lives in range(3, 6):
            wait_recorded(fleet, waiting, 2)
            restart(fleet.coordinator)
            worker.wait_said("connected to", count=lives)
        fleet.open_gate(worker)
        assert waiting.result(TIMEOUT_S).loss == pytest.approx(2.48)
        assert tc.optim_step().result(TIMEOUT_S).step == 2
        assert attempts(fleet) == []


def test_a_worker_that_leaves_is_not_counted(fleet: FaultyCluster):
    with fleet.client() as client:
        worker = fleet.add_faulty_worker("--grace-s", "0.2")
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        waiting = tc.forward_backward(batch(GATE))
        for _ in range(3):
            wait_recorded(fleet, waiting)
            assert worker.stop() == 0
            fleet.revive(worker)
        fleet.open_gate(worker)
        assert waiting.result(TIMEOUT_S).loss == pytest.approx(2.49)
        assert attempts(fleet) == []


def die_of(fleet: FaultyCluster, waiting: OperationFuture) -> int:
    """Revives every worker that dies until the operation has ended; how many did."""
    deaths = 0
    while (death := fleet.next_death(unless=waiting)) is not None:
        assert death[1] == -signal.SIGKILL
        fleet.revive(death[0])
        deaths += 1
    return deaths


def test_a_run_whose_recovery_takes_workers_with_it_does_not_take_the_fleet(fleet: FaultyCluster):
    """What was replayed well before crashes every worker now; later it is well again."""
    with fleet.client() as client:
        for _ in range(2):
            fleet.add_faulty_worker()
        others = [client.create_training_client({"model_ref": "any"}) for _ in range(3)]
        for other in others:
            assert train(other, 1)
        tc = client.create_training_client({"model_ref": "any", "seed": 2})
        assert tc.forward_backward(batch(CRASH_LATER)).result(TIMEOUT_S)
        assert tc.optim_step().result(TIMEOUT_S).step == 1
        fleet.deadly.touch()
        for worker in fleet.workers:  # whoever holds it
            worker.kill()
            fleet.revive(worker)
        waiting = [f for _ in range(3) for f in (tc.forward_backward(batch()), tc.optim_step())]
        deaths = die_of(fleet, waiting[-1])
        assert 3 <= deaths <= 4
        assert {reason(future) for future in waiting} <= {"INTERNAL", "WINDOW_POISONED"}
        assert "was being brought to a worker" in str(waiting[-1].exception())
        for other in others:
            assert [step for step, _ in train(other, 2)] == [2, 3]
        # Whoever insists costs one worker each time, until the cause is gone.
        again = tc.forward_backward(batch())
        assert die_of(fleet, again) == 1
        assert reason(again) == "INTERNAL"
        fleet.deadly.unlink()
        assert reason(tc.optim_step()) == "WINDOW_POISONED"  # it closes the window with the holes
        assert [step for step, _ in train(tc, 2)] == [2, 3]
        assert attempts(fleet) == []
