"""The coordinator's memory does not grow with what waits, nor with who does not read."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.cluster import Cluster
from harness.memory import rss_mib
from harness.wire import RawClient, batch, forward_backward, int32, int64, raw_client

from tensafe.v1 import operations_pb2, operations_pb2_grpc
from tensafe.v1 import training_pb2 as pb
from tensafe.wire.channel import client_options
from tensafe_client import ServiceClient, WindowPoisonedError

TOKENS = 8_000  # two tensors of 4 bytes each: specs of 63 KiB, in the row; results of 32 KiB
SPEC_BYTES = 8 * TOKENS
SPEC_MEMORY_MIB = 8
REFUSED, REFUSED_MIB = 20_000, 16


def new_run(raw: RawClient) -> str:
    request = pb.CreateRunRequest(
        request_id=uuid.uuid4().hex, config=pb.RunConfig(model_ref="any", seed=1)
    )
    return str(raw.stub.CreateRun(request, metadata=raw.metadata).run.id)


def fill(raw: RawClient, run: str, operations: int) -> str:
    """Queues so many operations; returns the id of the last."""
    last = ""
    for begin in range(1, operations + 1, 32):
        answer = submit_many(raw, run, begin, min(32, operations + 1 - begin))
        last = answer.outcomes[-1].operation_id
    return last


def submit_many(raw: RawClient, run: str, first: int, count: int) -> pb.SubmitBatchResponse:
    """Queues so many operations, from this seq on."""
    ids = int32([7] * TOKENS)
    content = batch(int64([0, TOKENS]), ids, target_tokens=ids)
    seqs = range(first, first + count)
    request = pb.SubmitBatchRequest(
        operations=[forward_backward(run, seq, content) for seq in seqs]
    )
    answer = raw.stub.SubmitBatch(request, metadata=raw.metadata, timeout=60)
    assert not any(outcome.HasField("error") for outcome in answer.outcomes)
    return answer


async def open_watches(cluster: Cluster, key: str, count: int) -> list[object]:
    """Streams whose first answer is read and no other."""
    open_calls: list[object] = []
    for _ in range(count // 50):
        channel = grpc.aio.insecure_channel(
            cluster.target, options=[*client_options(), ("grpc.use_local_subchannel_pool", 1)]
        )
        stub = operations_pb2_grpc.OperationsServiceStub(channel)
        for _ in range(50):
            call = stub.Watch(
                operations_pb2.WatchRequest(include_metrics=True),
                metadata=(("authorization", f"Bearer {key}"),),
            )
            await call.read()
            open_calls += [channel, call]
    return open_calls


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, "--spec-memory-mib", str(SPEC_MEMORY_MIB)) as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock")
        cluster.workers[0].wait_ready()
        cluster.workers[0].kill()
        yield cluster


@pytest.mark.parametrize(
    ("operations", "watchers", "queued_mib", "watched_mib"),
    [
        (1_200, 100, 40, 200),
        pytest.param(10_000, 1_000, 150, 400, marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_what_waits_and_who_does_not_read_costs_little(
    cluster: Cluster, operations: int, watchers: int, queued_mib: int, watched_mib: int
):
    coordinator = cluster.coordinator
    key = cluster.new_tenant("tenant")
    with raw_client(cluster.target, key) as raw:
        run = new_run(raw)
        fill(raw, new_run(raw), 64)  # buffers that every process needs
        before = rss_mib(coordinator.pid)
        last = fill(raw, run, operations)
        queued = rss_mib(coordinator.pid) - before
        print(f"{operations} operations, {operations * SPEC_BYTES / 2**20:.0f} MiB: +{queued:.0f}")
        assert queued < queued_mib < operations * SPEC_BYTES / 2**20

        # The same after a restart, which reads what waits without its specs.
        coordinator.kill()
        coordinator.start()
        coordinator.wait_ready()
        restarted = rss_mib(coordinator.pid) - before
        print(f"after a restart: {restarted:+.0f}")
        assert restarted < queued_mib

        loop = asyncio.new_event_loop()
        calls = loop.run_until_complete(open_watches(cluster, key, watchers))
        cluster.start_worker(cluster.workers[0])
        with ServiceClient(cluster.target, api_key=key) as client:
            assert client.future(last).result(250)
        watched = rss_mib(coordinator.pid) - before
        print(f"executed, with {watchers} watchers that do not read: {watched:+.0f}")
        assert watched < watched_mib
        for call in calls:
            if isinstance(call, grpc.aio.Call):
                call.cancel()
        loop.close()


def cancel_many(raw: RawClient, channel: grpc.Channel, run: str, first: int, count: int) -> None:
    """Queues so many operations and cancels them."""
    stub = operations_pb2_grpc.OperationsServiceStub(channel)
    cancels = [
        stub.CancelOperation.future(
            operations_pb2.CancelOperationRequest(
                operation_id=outcome.operation_id, request_id=uuid.uuid4().hex
            ),
            metadata=raw.metadata,
        )
        for outcome in submit_many(raw, run, first, count).outcomes
    ]
    states = {cancel.result(60).operation.state for cancel in cancels}
    assert states == {operations_pb2.OPERATION_STATE_CANCELLED}


def refuse_many(raw: RawClient, run: str, first: int, count: int) -> None:
    """Submits so many operations that are recorded as failed as they come."""
    content = batch(int64([0, 2]), int32([1, 2]), target_tokens=int32([2]))
    for begin in range(first, first + count, 1000):
        request = pb.SubmitBatchRequest(
            operations=[forward_backward(run, seq, content) for seq in range(begin, begin + 1000)]
        )
        answer = raw.stub.SubmitBatch(request, metadata=raw.metadata, timeout=60)
        assert all(outcome.HasField("error") for outcome in answer.outcomes)


def test_what_ended_behind_what_waits_costs_nothing(cluster: Cluster):
    """Cancelled and refused, and the same after a restart, which finds all of it in the log."""
    coordinator = cluster.coordinator
    key = cluster.new_tenant("tenant")
    address = cluster.target.removeprefix("grpc://")
    with (
        raw_client(cluster.target, key) as raw,
        grpc.insecure_channel(address, options=client_options()) as channel,
    ):
        run = new_run(raw)
        first = fill(raw, run, 1)  # it waits: there is no worker
        cancel_many(raw, channel, run, 2, 64)  # buffers that every process needs
        refuse_many(raw, run, 66, 1000)
        before = rss_mib(coordinator.pid)
        cancel_many(raw, channel, run, 1066, 64)
        refuse_many(raw, run, 1130, REFUSED)
        grown = rss_mib(coordinator.pid) - before
        print(f"{REFUSED} refused behind one that waits: {grown:+.0f} MiB")
        assert grown < REFUSED_MIB

        coordinator.kill()
        coordinator.start()
        coordinator.wait_ready()
        restarted = rss_mib(coordinator.pid) - before
        print(f"after a restart: {restarted:+.0f} MiB")
        assert restarted < REFUSED_MIB
        assert raw.next_seq(run) == 1130 + REFUSED
        cluster.start_worker(cluster.workers[0])
        with ServiceClient(cluster.target, api_key=key) as client:
            assert client.future(first).result(60)
            closing = client.training_client(run).optim_step().exception(60)
            assert isinstance(closing, WindowPoisonedError)
