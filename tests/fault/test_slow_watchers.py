"""A reader of metrics that stops reading holds nobody up, costs little, and gets the end state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.cluster import Cluster
from harness.memory import rss_mib

from tensafe.v1 import metrics_pb2 as pb
from tensafe.v1 import metrics_pb2_grpc
from tensafe.wire.channel import client_options
from tensafe_client import Datum, ServiceClient, TrainingClient

STEPS = 3_600
MOST_GROWTH_MIB = 40
BATCH = [Datum(tokens=[5, 6, 7], target_tokens=[6, 7, 8])]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock")
        cluster.workers[0].wait_ready()
        yield cluster


class Reader:
    """Reads a run's metrics over a connection of its own."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        # Without the second option gRPC takes ever more in ahead of a reader that does not read.
        options = [
            *client_options(),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
        ]
        self._channel = grpc.insecure_channel(
            cluster.target.removeprefix("grpc://"), options=options
        )
        self._stub = metrics_pb2_grpc.MetricsServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {key}"),)

    def read(self, run: str, since: int = 0, *, follow: bool = True) -> Iterator[pb.StepMetrics]:
        """Returns once the stream stands."""
        request = pb.StreamMetricsRequest(run_id=run, since=since, follow=follow)
        call = self._stub.StreamMetrics(request, metadata=self._metadata, timeout=120)
        first = next(call)
        assert not first.metrics
        return (step for answer in call for step in answer.metrics)

    def close(self) -> None:
        self._channel.close()


def train(run: TrainingClient, steps: int) -> None:
    """Updates the run so often, and returns when the last is told."""
    for _ in range(steps):
        run.forward_backward(BATCH)
        last = run.optim_step()
    last.result(120)


def up_to(steps: Iterator[pb.StepMetrics], last: int) -> list[pb.StepMetrics]:
    found = []
    for step in steps:
        found.append(step)
        if step.step == last:
            return found
    raise AssertionError("the stream has ended")


def test_who_stops_reading_holds_nobody_up_and_gets_the_end_state(cluster: Cluster):
    key = cluster.new_tenant("tenant")
    slow, quick = Reader(cluster, key), Reader(cluster, key)
    with ServiceClient(cluster.target, api_key=key) as client:
        run = client.create_training_client({"model_ref": "any", "seed": 1})
        missing = slow.read(run.run_id)
        follower = quick.read(run.run_id)
        train(run, 100)
        begin = up_to(missing, 100)
        assert [step.step for step in begin] == list(range(1, 101))
        up_to(follower, 100)
        before = rss_mib(cluster.coordinator.pid)

        for reached in range(100 + STEPS // 6, 101 + STEPS, STEPS // 6):
            train(run, STEPS // 6)  # … and the other reader has all of it, as it happens
            assert sum(1 + step.skipped for step in up_to(follower, reached)) == STEPS // 6
        grown = rss_mib(cluster.coordinator.pid) - before
        print(f"{STEPS} steps beside a reader that does not read: {grown:+.0f} MiB")
        assert grown < MOST_GROWTH_MIB

        rest = up_to(missing, 100 + STEPS)
        skipped = sum(step.skipped for step in rest)
        print(f"it then got {len(rest)} steps; {skipped} were left out")
        assert skipped > 0
        at = 100
        for step in rest:
            assert step.step == at + step.skipped + 1, "it says what is left out"
            at = step.step
        train(run, 1)
        [newest] = up_to(missing, 101 + STEPS)
        assert newest.skipped == 0

        whole = list(quick.read(run.run_id, begin[-1].cursor, follow=False))
        assert [step.step for step in whole] == list(range(101, 102 + STEPS))
        assert not any(step.skipped for step in whole)
    slow.close()
    quick.close()
