"""Full queues: refused by name, at no cost of a seq, and not noticed by users of the SDK."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.cluster import Cluster
from harness.wire import RawClient, batch, forward_backward, int32, int64, raw_client

from tensafe.v1 import training_pb2 as pb
from tensafe.wire.status import ErrorDetail, from_status
from tensafe_client import Datum, ServiceClient

LIMIT = 8


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    limits = ("--tenant-queue-operations", str(LIMIT), "--queue-operations", str(2 * LIMIT - 4))
    with Cluster(tmp_path, *limits, "--tenant-queue-mib", "1") as cluster:
        cluster.start()
        yield cluster


def new_run(raw: RawClient) -> str:
    request = pb.CreateRunRequest(
        request_id=uuid.uuid4().hex, config=pb.RunConfig(model_ref="any", seed=1)
    )
    return str(raw.stub.CreateRun(request, metadata=raw.metadata).run.id)


def passing(run: str, seq: int, tokens: int = 2) -> pb.OperationSpec:
    ids = int32([seq % 100 + 1] * tokens)
    return forward_backward(run, seq, batch(int64([0, tokens]), ids, target_tokens=ids))


def submit(raw: RawClient, *specs: pb.OperationSpec) -> list[ErrorDetail | None]:
    answer = raw.stub.SubmitBatch(
        pb.SubmitBatchRequest(operations=specs), metadata=raw.metadata, timeout=30
    )
    return [
        from_status(outcome.error) if outcome.HasField("error") else None
        for outcome in answer.outcomes
    ]


def start_mock(cluster: Cluster) -> None:
    cluster.add_worker("--backend", "mock")
    cluster.workers[0].wait_ready()


def publish_model(cluster: Cluster) -> None:
    """The mock model is known from its worker's first visit on."""
    start_mock(cluster)
    cluster.workers[0].kill()


def test_five_hundred_operations_of_two_tenants_pass_a_queue_of_eight(cluster: Cluster):
    start_mock(cluster)
    datum = [Datum(tokens=[1, 2], target_tokens=[2, 3])]
    ends: dict[str, list[int]] = {"a": [], "b": []}

    def train(name: str) -> None:
        with ServiceClient(cluster.target, api_key=cluster.new_tenant(name)) as client:
            tc = client.create_training_client({"model_ref": "any", "seed": 1})
            futures = [
                tc.optim_step() if number % 2 else tc.forward_backward(datum)
                for number in range(500)
            ]
            ends[name] = [future.result(120).step for future in futures[1::2]]

    threads = [threading.Thread(target=train, args=(name,)) for name in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {"a": list(range(1, 251)), "b": list(range(1, 251))}


def test_a_full_queue_names_the_limit_and_uses_up_no_seq(cluster: Cluster):
    publish_model(cluster)
    key = cluster.new_tenant("a")
    with raw_client(cluster.target, key) as raw:
        run = new_run(raw)
        answers = submit(raw, *(passing(run, seq) for seq in range(1, 13)))
        assert answers[:LIMIT] == [None] * LIMIT
        for refused in answers[LIMIT:]:
            assert refused is not None
            assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
            assert refused.metadata["limit"] == "tenant_operations"
            assert refused.metadata["limit_value"] == str(LIMIT)
            assert refused.metadata["resource"].startswith("tenants/")
            assert refused.retry_delay_s
        assert raw.next_seq(run) == LIMIT + 1
        # What was accepted is accepted, however full the queue is.
        assert submit(raw, passing(run, 3)) == [None]
        single = raw.submit(passing(run, LIMIT + 1))
        assert single is not None
        assert single.reason == "QUEUE_FULL"
        cluster.start_worker(cluster.workers[0])
        with ServiceClient(cluster.target, api_key=key) as client:
            last = client.operations(run)[0]
            client.future(last.id).result(60)
        assert submit(raw, *(passing(run, seq) for seq in range(LIMIT + 1, 13))) == [None] * 4


def test_the_limit_in_all_is_another_one(cluster: Cluster):
    publish_model(cluster)
    for name, room in (("a", LIMIT), ("b", LIMIT - 4)):
        with raw_client(cluster.target, cluster.new_tenant(name)) as raw:
            run = new_run(raw)
            answers = submit(raw, *(passing(run, seq) for seq in range(1, LIMIT + 1)))
            assert answers[:room] == [None] * room
            for refused in answers[room:]:
                assert refused is not None
                assert refused.metadata["limit"] == "all_operations"
                assert refused.metadata["resource"] == "server"


def test_bytes_are_limited_and_a_lone_large_operation_is_not_locked_out(cluster: Cluster):
    publish_model(cluster)
    with raw_client(cluster.target, cluster.new_tenant("a")) as raw:
        run = new_run(raw)
        large = 2**20 // 8  # two tensors of four bytes a token: 1 MiB and the rest
        answers = submit(raw, passing(run, 1, large), passing(run, 2))
        assert answers[0] is None
        assert answers[1] is not None
        assert answers[1].metadata["limit"] == "tenant_bytes"


def test_what_came_early_leaves_room_for_what_is_missing(cluster: Cluster):
    publish_model(cluster)
    key = cluster.new_tenant("a")
    with raw_client(cluster.target, key) as raw:
        run = new_run(raw)
        early = submit(raw, *(passing(run, seq) for seq in range(2, 12)))
        assert early[: LIMIT // 2] == [None] * (LIMIT // 2)
        assert all(refused is not None for refused in early[LIMIT // 2 :])
        assert submit(raw, passing(run, 1)) == [None]
        assert raw.next_seq(run) == LIMIT // 2 + 2
