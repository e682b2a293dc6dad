"""SIGTERM: what runs is finished, what waits is kept, and it ends with 0 in its grace period."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from harness.cluster import Cluster
from harness.faulty_fleet import FaultyCluster
from harness.faulty_worker import GATE

from tensafe.v1 import worker_pb2, worker_pb2_grpc
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient


def batch(first: int = 5) -> list[Datum]:
    return [Datum(tokens=[first, 6, 7], target_tokens=[6, 7, 8])]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FaultyCluster]:
    with FaultyCluster(tmp_path) as cluster:
        cluster.start()
        yield cluster


def wait_running(client: ServiceClient, future: OperationFuture) -> None:
    while True:
        operation_id = future.operation_id
        if operation_id and client.operation(operation_id).state == "running":
            return
        assert not future.done()


def pipeline(tc: TrainingClient, steps: int) -> list[tuple[OperationFuture, OperationFuture]]:
    return [(tc.forward_backward(batch()), tc.optim_step()) for _ in range(steps)]


def test_a_worker_finishes_what_runs_and_hands_over_the_rest(fleet: FaultyCluster):
    with ServiceClient(fleet.target, api_key=fleet.new_tenant("tenant")) as client:
        leaving = fleet.add_faulty_worker()
        tc = client.create_training_client({"model_ref": "any", "seed": 1})
        running = tc.forward_backward(batch(GATE))
        rest = [tc.optim_step(), *(one for pair in pipeline(tc, 5) for one in pair)]
        wait_running(client, running)
        fleet.add_faulty_worker()
        leaving.signal(signal.SIGTERM)
        fleet.coordinator.wait_said("(worker-0) is leaving")
        fleet.open_gate(leaving)
        assert leaving.wait_ended(30) == 0
        assert running.result(30).loss == pytest.approx(2.49)
        assert [future.result(30).step for future in rest[::2]] == [1, 2, 3, 4, 5, 6]
        # It reported what it had done, and stored its state before it went: nothing is replayed.
        assert "at seq 1 and 0 operations after it" in fleet.coordinator.log


def test_a_worker_ends_when_its_grace_period_is_over(fleet: FaultyCluster):
    with ServiceClient(fleet.target, api_key=fleet.new_tenant("tenant")) as client:
        leaving = fleet.add_faulty_worker("--grace-s", "0.5")
        tc = client.create_training_client({"model_ref": "any", "seed": 1})
        running = tc.forward_backward(batch(GATE))
        wait_running(client, running)
        other = fleet.add_faulty_worker()
        leaving.signal(signal.SIGTERM)
        assert leaving.wait_ended(30) == 0  # though its operation never ends
        leaving.wait_said("the grace period of 0.5 s is over")
        fleet.open_gate(other)
        assert running.result(30).loss == pytest.approx(2.49)


def test_a_second_signal_ends_a_worker_at_once(fleet: FaultyCluster):
    with ServiceClient(fleet.target, api_key=fleet.new_tenant("tenant")) as client:
        leaving = fleet.add_faulty_worker("--grace-s", "600")
        tc = client.create_training_client({"model_ref": "any", "seed": 1})
        running = tc.forward_backward(batch(GATE))
        wait_running(client, running)
        leaving.signal(signal.SIGTERM)
        leaving.wait_said("SIGTERM: leaving")
        leaving.signal(signal.SIGTERM)
        assert leaving.wait_ended(30) == 128 + signal.SIGTERM


def test_a_coordinator_under_load_loses_nothing_and_repeats_nothing(tmp_path: Path):
    """SIGTERM twice under a pipelined client, with a restart each time."""
    with Cluster(tmp_path) as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock")
        cluster.workers[0].wait_ready()
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("tenant")) as client:
            undisturbed = pipeline(
                client.create_training_client({"model_ref": "any", "seed": 1}), 300
            )
            expected = [(f.result(60).loss, s.result(60).step) for f, s in undisturbed]
            tc = client.create_training_client({"model_ref": "any", "seed": 1})
            resolved: list[int] = []
            pairs = []
            for part in range(3):
                mine = pipeline(tc, 100)
                pairs += mine
                for future in (one for pair in mine for one in pair):
                    future.add_done_callback(lambda done: resolved.append(done.seq))
                if part < 2:
                    mine[3][1].result(60)
                    assert cluster.coordinator.stop() == 0
                    cluster.coordinator.start()
            assert [(f.result(60).loss, s.result(60).step) for f, s in pairs] == expected
            assert sorted(resolved) == list(range(1, 601))
            assert [item.step for item in tc.metrics()] == list(range(1, 301))
        assert cluster.stop() == [0, 0]


def test_metrics_are_followed_through_a_restart(tmp_path: Path):
    with Cluster(tmp_path) as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock")
        cluster.workers[0].wait_ready()
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("tenant")) as client:
            tc = client.create_training_client({"model_ref": "any", "seed": 1})
            seen: queue.SimpleQueue[int] = queue.SimpleQueue()

            def follow() -> None:
                for item in tc.metrics(follow=True):
                    seen.put(item.step)

            follower = threading.Thread(target=follow)
            follower.start()
            pipeline(tc, 3)
            assert [seen.get(timeout=60) for _ in range(3)] == [1, 2, 3]
            assert cluster.coordinator.stop() == 0
            cluster.coordinator.start()
            pipeline(tc, 3)
            assert [seen.get(timeout=60) for _ in range(3)] == [4, 5, 6]
            tc.delete()
            follower.join(60)
            assert not follower.is_alive(), "a run that is deleted ends its streams"
        assert cluster.stop() == [0, 0]


@contextmanager
def a_call_that_never_ends(cluster: Cluster) -> Iterator[None]:
    """An upload that sends nothing, so that the server has a call to wait for."""
    channel = grpc.insecure_channel(cluster.target)
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    never = threading.Event()

    def requests() -> Iterator[object]:
        never.wait()
        yield

    metadata = [("authorization", f"Bearer {cluster.worker_key}")]
    call = stub.UploadArtifact.future(requests(), metadata=metadata)
    # A second call on the same connection: when it is answered, the first has arrived.
    with pytest.raises(grpc.RpcError):
        stub.PublishModel(worker_pb2.PublishModelRequest(), metadata=metadata, timeout=10)
    yield
    never.set()
    call.cancel()
    channel.close()


def test_a_coordinator_ends_within_its_grace_period(tmp_path: Path):
    with Cluster(tmp_path, "--grace-s", "1") as cluster:
        cluster.start()
        with a_call_that_never_ends(cluster):
            began = time.monotonic()
            assert cluster.coordinator.stop() == 0
            assert time.monotonic() - began >= 0.9  # it did wait for the call


def test_a_second_signal_ends_a_coordinator_at_once(tmp_path: Path):
    with Cluster(tmp_path, "--grace-s", "600") as cluster:
        cluster.start()
        with a_call_that_never_ends(cluster):
            cluster.coordinator.signal(signal.SIGTERM)
            cluster.coordinator.wait_said("SIGTERM: ending")
            cluster.coordinator.signal(signal.SIGTERM)
            assert cluster.coordinator.wait_ended(30) == 128 + signal.SIGTERM
