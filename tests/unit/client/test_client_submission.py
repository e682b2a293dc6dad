"""Numbering, coalescing, retries, reconnects: what the caller must not notice."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from fake_server import API_KEY, FakeCoordinator

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_client import (
    AuthenticationError,
    BatchError,
    ClientClosedError,
    ConfigError,
    ConnectionFailedError,
    Datum,
    InvalidArgumentError,
    MessageTooLargeError,
    SequenceConflictError,
    ServiceClient,
    TrainingClient,
)
from tensafe_client.submission import Submission, _serialize

Batch = dict[str, list[list[int]]]


def test_what_waits_is_coalesced_in_order(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.gate.clear()
    futures = [tc.optim_step() for _ in range(601)]
    server.gate.set()
    assert [future.result(timeout=20).step for future in futures] == list(range(1, 602))
    assert [seq for seqs in server.batches for seq in seqs] == list(range(1, 602))
    assert max(map(len, server.batches)) == 256
    assert len(server.batches) <= 5


def test_batches_are_cut_by_size(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.gate.clear()
    big = [Datum(np.zeros(90_000, int), np.zeros(90_000, int))]  # about 1 MiB
    futures = [tc.forward_backward(big) for _ in range(7)]
    server.gate.set()
    for future in futures:
        future.result(timeout=20)
    assert max(map(len, server.batches)) <= 3
    assert max(map(len, server.requests)) <= 3 * 2**20 + 1024


def test_an_operation_beyond_the_limit_is_refused_here(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    huge = [Datum(np.zeros(1_500_000, int), np.zeros(1_500_000, int))]
    with pytest.raises(MessageTooLargeError, match="16,777,216") as caught:
        tc.forward_backward(huge)
    assert "split it" in str(caught.value)


class Unreadable(dict[str, Any]):
    """A batch whose own code fails while it is read."""

    def get(self, *_: Any) -> Any:
        raise RuntimeError("the dataset is gone")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({"input_ids": [[1, 2]]},), BatchError),
        (([Datum(np.zeros(1_500_000, int), np.zeros(1_500_000, int))],), MessageTooLargeError),
        (([Datum([1], [2])], "cross_entropy", "median"), InvalidArgumentError),
        (([Datum([1], [2])], 5), ConfigError),
        ((Unreadable(input_ids=[[1, 2]]),), RuntimeError),
    ],
    ids=["batch", "size", "reduction", "loss", "dataset"],
)
def test_a_forward_backward_that_is_refused_here_is_recorded_as_failed(
    tc: TrainingClient, server: FakeCoordinator, arguments: Any, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        tc.forward_backward(*arguments)
    closing = tc.optim_step()
    assert closing.seq == 2
    closing.result(timeout=10)
    recorded = server.stored[server.by_place[tc.run_id, 1]].operation
    assert recorded.kind == ops.OPERATION_KIND_FORWARD_BACKWARD
    assert recorded.state == ops.OPERATION_STATE_FAILED


@pytest.mark.parametrize("refused", ["forward", "optim_step"])
def test_what_adds_no_gradient_takes_no_seq_when_it_is_refused_here(
    tc: TrainingClient, refused: str
) -> None:
    with pytest.raises(InvalidArgumentError):
        getattr(tc, refused)("no batch and no number")
    assert tc.optim_step().seq == 1


def test_a_refusal_after_the_client_was_closed_keeps_its_cause(
    client: ServiceClient, tc: TrainingClient
) -> None:
    client.close()
    with pytest.raises(BatchError):
        tc.forward_backward([])
    with pytest.raises(ClientClosedError):
        tc.optim_step()


def test_threads_share_one_numbering(tc: TrainingClient, server: FakeCoordinator) -> None:
    futures: list[Any] = []

    def submit() -> None:
        futures.extend([tc.optim_step() for _ in range(50)])

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(future.result(timeout=10).step for future in futures) == list(range(1, 401))
    assert [seq for seqs in server.batches for seq in seqs] == list(range(1, 401))


def test_a_lost_reply_is_sent_again_byte_for_byte(
    tc: TrainingClient, batch: Batch, server: FakeCoordinator
) -> None:
    server.lose_replies = 2
    loss, step = tc.forward_backward(batch), tc.optim_step()
    assert loss.result(timeout=10).loss == 2.49
    assert step.result(timeout=10).step == 1
    tc.refresh()
    again = tc.optim_step()
    assert again.result(timeout=10).step == 2
    assert len(server.stored) == 3
    assert len(set(server.requests)) < len(server.requests)


def test_a_full_queue_only_delays(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.queue_full = 5
    futures = [tc.optim_step() for _ in range(4)]
    assert sorted(future.result(timeout=10).step for future in futures) == [1, 2, 3, 4]
    assert server.queue_full == 0


def test_a_conflict_is_typed(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.refuse[1] = TenSafeFault("SEQ_CONFLICT", "seq 1 of run-1 is taken", run_id="run-1")
    with pytest.raises(SequenceConflictError, match="one process"):
        tc.optim_step().result(timeout=10)


def test_the_watch_resumes_from_its_cursor(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    futures = [tc.optim_step() for _ in range(4)]
    assert futures[0].cancel()  # so that all were submitted
    for _ in range(3):
        server.cut_watches()
        server.release(1)
    for future in futures[1:]:
        future.result(timeout=20)
    assert server.watches[0] is None
    assert None not in server.watches[1:]
    resumed = [cursor for cursor in server.watches[1:] if cursor is not None]
    assert resumed == sorted(resumed)


def test_an_outage_only_makes_futures_wait(tc: TrainingClient, server: FakeCoordinator) -> None:
    assert tc.optim_step().result(timeout=10).step == 1
    server.hold = True
    accepted = tc.optim_step()
    assert tc.optim_step().cancel()  # so that both were submitted
    server.stop()
    sent_in_the_dark = tc.optim_step()
    server.hold = False
    server.start()
    server.release()
    assert accepted.result(timeout=30).step == 2
    assert sent_in_the_dark.result(timeout=30).step == 3


def test_a_server_that_forgot_the_cursor(tc: TrainingClient, server: FakeCoordinator) -> None:
    assert tc.optim_step().result(timeout=10).step == 1
    server.hold = True
    lost = tc.optim_step()
    assert tc.optim_step().cancel()  # so that both were submitted
    with server.lock:
        server.events.clear()
        for stored in server.stored.values():
            if stored.operation.state == 1:
                server._execute(stored)
        server.events.clear()
    server.cut_watches()
    assert lost.result(timeout=20).step == 2


def test_operations_without_seq(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    futures = [tc.sample_async("hi", step=3) for _ in range(20)]
    futures += [client.sample_async(["a", "b"], model="m") for _ in range(20)]
    futures += [tc.sample_async("hi", artifact="art-1")]
    for future in futures:
        assert future.seq == 0
        assert future.result(timeout=10).samples[0].completion == " and so on"
    assert tc.optim_step().seq == 1
    kinds = [stored.spec.sample.weights.WhichOneof("source") for stored in server.stored.values()]
    assert {"version", "base_model", "artifact_id"} <= set(filter(None, kinds))
    assert server.lose_replies == 0
    server.lose_replies = 1
    assert client.sample("x", artifact="art-1").samples[0].prompt == "x"
    assert len(server.stored) == 43


def test_nothing_listens(unused_port: int) -> None:
    client = ServiceClient(f"127.0.0.1:{unused_port}", timeout_s=0.4)
    begin = time.monotonic()
    with pytest.raises(ConnectionFailedError, match="tensafe up") as caught:
        client.runs()
    assert f"127.0.0.1:{unused_port}" in str(caught.value)
    assert isinstance(caught.value, ConnectionError)
    with pytest.raises(ConnectionFailedError):
        client.sample("hi", model="m")
    assert time.monotonic() - begin < 10
    client.close()


def test_an_outage_of_a_call_is_bounded(server: FakeCoordinator) -> None:
    hasty = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY, timeout_s=1)
    patient = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
    assert hasty.runs() == patient.runs() == []
    server.stop()
    with pytest.raises(ConnectionFailedError, match="within 1 s"):
        hasty.runs()
    server.start()
    assert patient.runs() == []
    hasty.close()
    patient.close()


def test_a_bad_key(server: FakeCoordinator) -> None:
    with ServiceClient(f"127.0.0.1:{server.port}", api_key="ts_wrong") as client:
        with pytest.raises(AuthenticationError, match="api_key="):
            client.create_training_client({"model_ref": "m"})
        with pytest.raises(AuthenticationError):
            client.sample("hi", model="m")


def test_close_sends_what_waits_and_ends_what_is_open(server: FakeCoordinator) -> None:
    client = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
    tc = client.create_training_client({"model_ref": "m"})
    server.hold = True
    futures = [tc.optim_step() for _ in range(300)]
    client.close()
    assert [seq for seqs in server.batches for seq in seqs] == list(range(1, 301))
    for future in futures:
        with pytest.raises(ClientClosedError, match="goes on"):
            future.result(timeout=1)
    with pytest.raises(ClientClosedError):
        tc.optim_step()
    with pytest.raises(ClientClosedError):
        client.runs()
    client.close()


def test_joined_operations_are_a_request_of_the_stream() -> None:
    specs = [pb.OperationSpec(run_id="run-1", seq=n, optim_step=pb.OptimStep()) for n in (1, 2)]
    specs.append(pb.OperationSpec(run_id="x" * 300))
    batch = [Submission(spec.SerializeToString(), None) for spec in specs]  # type: ignore[arg-type]
    expected = pb.SubmitBatchRequest(operations=specs, session_id="ses-1")
    assert pb.SubmitStreamRequest.FromString(_serialize(batch, "ses-1")).batch == expected


def test_presence_on_the_wire(tc: TrainingClient, server: FakeCoordinator) -> None:
    tc.optim_step().result(timeout=10)
    tc.optim_step(learning_rate=0, weight_decay=0.0).result(timeout=10)
    tc.sample("p", temperature=0, seed=0, top_k=0, stop=[])
    tc.sample("p")
    plain, zeros, greedy, default = [stored.spec for stored in server.stored.values()]
    assert not plain.optim_step.ListFields()
    assert {f.name for f, _ in zeros.optim_step.ListFields()} == {"learning_rate", "weight_decay"}
    params = greedy.sample.params
    for name in ("temperature", "seed", "top_k", "stop"):
        assert params.HasField(name)
    assert not default.sample.params.ListFields()


def test_asyncio_submissions_are_in_order(tc: TrainingClient) -> None:
    async def many() -> list[int]:
        return [result.step for result in await asyncio.gather(*(tc.optim_step() for _ in "abc"))]

    assert asyncio.run(many()) == [1, 2, 3]
