"""SIGKILL at every stage of a private step: nothing is released twice, or for free.

Whatever dies, what a worker has released is charged, no charge was used twice, no sum was noised
twice, and the run goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.cluster import Cluster
from harness.private_clients import events, ledger, private_run
from harness.private_worker import PrivateWorker, VanishedError, is_kind

from tensafe import failpoints
from tensafe_client import Datum, DPStepLostError, ServiceClient
from tensafe_server.store.charges import first_break

pytestmark = pytest.mark.slow
COORDINATORS_POINTS = [
    "mid-charge",
    "after-charge",
    "after-dispatch",
    "after-private-snapshot",
    "after-result-before-commit",
    "after-private-commit",
]
STEPS = 4


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "home") as cluster:
        cluster.start()
        yield cluster


def kill_at(cluster: Cluster, point: str, hits: Path) -> threading.Thread:
    """The coordinator dies when it comes by for the second time, and is started again."""
    cluster.coordinator.stop()
    cluster.coordinator.start(
        {failpoints.VARIABLE: f"{point}=kill@2", failpoints.ONCE_VARIABLE: str(hits)}
    )
    cluster.coordinator.wait_ready()

    def revive() -> None:
        assert cluster.coordinator.wait_ended() == -9
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()

    thread = threading.Thread(target=revive)
    thread.start()
    return thread


def check_released(cluster: Cluster, workers: list[PrivateWorker], run_id: str) -> None:
    """What was released is charged once, and no batch was in two releases."""
    rows = ledger(cluster)
    assert first_break(rows) is None
    reserved = {row.charge_id for row in rows if row.event == "reserve"}
    released = {row.charge_id for row in rows if row.event == "release"}
    charges = [charge for worker in workers for charge in worker.releases[run_id]]
    assert len(charges) == len(set(charges))
    assert set(charges) <= reserved - released
    batches = [one for worker in workers for window in worker.windows[run_id] for one in window]
    assert len(batches) == len(set(batches))


@pytest.mark.parametrize("point", COORDINATORS_POINTS)
def test_the_coordinator_dies_and_the_worker_lives(
    cluster: Cluster, point: str, tmp_path: Path
) -> None:
    worker = PrivateWorker(cluster.target, cluster.worker_key, comes_back=True)
    with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
        tc = private_run(client)
        reviving = kill_at(cluster, point, tmp_path)
        futures = []
        for number in range(STEPS):
            tc.forward_backward([Datum([number + 1], [number + 2])])
            futures.append(tc.optim_step())
        assert [future.result(120).step for future in futures] == [1, 2, 3, 4]
        reviving.join()
        assert (tmp_path / point).exists()
        assert tc.refresh().step == STEPS
    check_released(cluster, [worker], tc.run_id)
    found = events(cluster)
    assert found.count("commit") == len(worker.releases[tc.run_id]) == STEPS
    assert "lose" not in found
    worker.close()


@pytest.mark.parametrize("point", COORDINATORS_POINTS)
def test_the_coordinator_and_the_worker_die(cluster: Cluster, point: str, tmp_path: Path) -> None:
    first = PrivateWorker(cluster.target, cluster.worker_key)
    with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
        tc = private_run(client)
        reviving = kill_at(cluster, point, tmp_path)
        first.join()  # its stream broke when the coordinator was stopped
        second = PrivateWorker(cluster.target, cluster.worker_key)
        outcomes: list[Any] = []
        futures = []
        for number in range(STEPS):
            tc.forward_backward([Datum([number + 1], [number + 2])])
            futures.append(tc.optim_step())
        second.join()
        second.vanish()
        reviving.join()
        third = PrivateWorker(cluster.target, cluster.worker_key)
        for future in futures:
            error = future.exception(120)
            assert error is None or isinstance(error, DPStepLostError)
            outcomes.append(error)
        assert (tmp_path / point).exists()
        lost = sum(error is not None for error in outcomes)
        assert lost <= 1
        assert tc.refresh().step == STEPS - lost
    workers = [first, second, third]
    check_released(cluster, workers, tc.run_id)
    found = events(cluster)
    assert found.count("commit") == STEPS - lost
    assert found.count("lose") == lost
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("stage", ["begin", "snapshot", "report"])
def test_the_worker_dies(cluster: Cluster, stage: str) -> None:
    first = PrivateWorker(cluster.target, cluster.worker_key)
    with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
        tc = private_run(client)
        steps = 0

        def die(at: str, planned: Any) -> None:
            nonlocal steps
            steps += at == stage and is_kind(planned, "optim_step")
            if steps == 2:
                first.vanish()
                raise VanishedError

        first.before = die
        futures = []
        for number in range(STEPS):
            tc.forward_backward([Datum([number + 1], [number + 2])])
            futures.append(tc.optim_step())
        first.join()
        second = PrivateWorker(cluster.target, cluster.worker_key)
        errors = [future.exception(120) for future in futures]
        assert [isinstance(error, DPStepLostError) for error in errors] == [False, True] + [
            False
        ] * (STEPS - 2)
        assert tc.refresh().step == STEPS - 1
    check_released(cluster, [first, second], tc.run_id)
    assert events(cluster).count("lose") == 1
    first.close()
    second.close()
