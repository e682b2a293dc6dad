"""What a server had accepted, and does not have any more when it comes back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_server import API_KEY, FakeCoordinator

from tensafe.v1 import operations_pb2 as ops
from tensafe_client import (
    OperationLostError,
    ResourceExhaustedError,
    SequenceGapError,
    ServiceClient,
    TrainingClient,
)
from tensafe_client.futures import OperationFuture


def accepted(tc: TrainingClient, count: int) -> list[OperationFuture]:
    """Operations that the server holds."""
    futures = [tc.optim_step() for _ in range(count)]
    assert futures[0].cancel()  # so that all were submitted
    return futures


def test_who_waits_for_what_is_lost_hears_of_it(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    assert tc.optim_step().result(timeout=10).step == 1
    server.hold = True
    _, kept, lost, last = accepted(tc, 4)
    server.stop()
    server.forget(2)
    server.start()
    for future in (lost, last):
        with pytest.raises(OperationLostError, match=rf"seq {future.seq} of {tc.run_id}") as caught:
            future.result(timeout=20)
        assert "client.training_client(run_id)" in str(caught.value)
    with pytest.raises(SequenceGapError, match="does not have it any more"):
        tc.optim_step()
    server.release()
    assert kept.result(timeout=20).step == 2
    again = client.training_client(tc.run_id)
    assert [again.optim_step().result(timeout=20).step for _ in range(2)] == [3, 4]


def test_what_comes_after_seqs_that_are_lost_is_not_sent(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    """Though nobody waits for them any more."""
    for _ in range(3):
        tc.optim_step().result(timeout=10)
    other = client.create_training_client({"model_ref": "mock"})
    server.hold = True
    [_, waiting] = accepted(other, 2)
    server.stop()
    with server.lock:
        server.runs[tc.run_id].next_seq = 2
    server.start()
    server.release()
    waiting.result(timeout=20)
    with pytest.raises(SequenceGapError, match=f"run {tc.run_id} had from seq 2 on"):
        tc.optim_step()


@pytest.mark.parametrize("queue_full", [0, 1])
def test_what_is_on_its_way_meanwhile_is_answered_before_the_run_goes_on(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator, queue_full: int
) -> None:
    """Else the server would take it in among what is sent in its place."""
    server.hold = True
    _, _, lost = accepted(tc, 3)
    server.stop()
    under_way = tc.optim_step()
    server.forget(1)
    server.gate.clear()
    server.start()
    with pytest.raises(OperationLostError):
        lost.result(timeout=20)
    server.queue_full = queue_full
    with ThreadPoolExecutor() as pool:
        attaching = pool.submit(client.training_client, tc.run_id)
        with pytest.raises(TimeoutError):
            attaching.result(timeout=0.5)
        server.gate.set()
        again = attaching.result(timeout=20)
    server.release()
    if queue_full:
        with pytest.raises(ResourceExhaustedError):
            under_way.result(timeout=20)
    else:
        under_way.result(timeout=20)
    again.optim_step().result(timeout=20)
    assert server.batches[-2:] == [[under_way.seq], [lost.seq if queue_full else under_way.seq + 1]]


def test_a_sample_that_is_lost(client: ServiceClient, server: FakeCoordinator) -> None:
    server.hold = True
    lost = client.sample_async("a", model="m")
    session = lost._session
    assert session.io.run(session.operations.identified(lost))
    server.stop()
    server.forget(1)
    server.start()
    with pytest.raises(OperationLostError, match="can be sent again"):
        lost.result(timeout=20)


def test_many_are_asked_for_at_once(client: ServiceClient, server: FakeCoordinator) -> None:
    """One after the other, a thousand samples would hold up what the stream has to tell."""
    server.hold = True
    samples = [client.sample_async("a", model="m") for _ in range(2)]
    session = samples[0]._session
    assert all(session.io.run(session.operations.identified(one)) for one in samples)
    server.stop()
    both, read = threading.Barrier(2), server.GetOperation

    def read_both(request: Any, context: Any) -> Any:
        both.wait(timeout=10)
        return read(request, context)

    server.GetOperation = read_both  # type: ignore[method-assign]
    server.start()
    server.release()
    for one in samples:
        one.result(timeout=20)


def test_a_server_that_cannot_say_is_asked_again(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    _, lost = accepted(tc, 2)
    server.stop()
    server.forget(1)
    server.unanswered = 2
    server.start()
    with pytest.raises(OperationLostError):
        lost.result(timeout=20)
    assert server.unanswered == 0


def test_a_run_of_which_the_server_cannot_say_holds_up_nothing_else(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    other = client.create_training_client({"model_ref": "mock"})
    server.hold = True
    _, waiting, lost = accepted(tc, 3)
    _, others_waiting, others_lost = accepted(other, 3)
    server.stop()
    with server.lock:
        server.stored.pop(lost.operation_id or "")
        server.runs[tc.run_id].next_seq = lost.seq
    server.forget(1)
    server.broken_runs.add(tc.run_id)
    server.start()
    with pytest.raises(OperationLostError):
        others_lost.result(timeout=20)
    server.release()
    assert waiting.result(timeout=20)
    assert others_waiting.result(timeout=20)
    assert len(server.watches) == 2, "the stream stands"
    assert not lost.done()
    server.broken_runs.clear()
    with pytest.raises(OperationLostError):
        lost.result(timeout=20)


def test_a_server_that_lives_on_is_not_asked(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    _, waiting = accepted(tc, 2)
    for cut in range(2):
        server.cut_watches()
        with server.lock:
            came_back = cut + 2
            assert server.lock.wait_for(lambda n=came_back: len(server.watches) == n, timeout=20)
    server.release()
    waiting.result(timeout=20)
    assert server.reads == []


def test_one_that_has_everything_is_asked_for_each_run_and_the_newest_of_it(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    _, *waiting = accepted(tc, 20)
    server.stop()
    server.start()
    server.release()
    for future in waiting:
        future.result(timeout=20)
    assert server.reads in ([], [tc.run_id], [tc.run_id, waiting[-1].operation_id])


def test_a_seq_that_was_used_again_is_another_operations(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    _, lost = accepted(tc, 2)
    with server.lock:
        operation = next(reversed(server.stored.values())).operation
        operation.id = "op-another"
        operation.state = ops.OPERATION_STATE_QUEUED
    server.release()
    with pytest.raises(OperationLostError):
        lost.result(timeout=20)


def test_one_that_another_client_has_used_again_before_the_server_is_asked(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    """The order is as long as it was, and nothing that happens to the other operation is told."""
    server.hold = True
    _, *lost = accepted(tc, 3)
    server.stop()
    with server.lock:
        for future in lost:
            stored = server.stored.pop(future.operation_id or "")
            stored.operation.id, stored.session_id = f"op-another-{future.seq}", "ses-another"
            server.stored[stored.operation.id] = stored
    server.start()
    for future in lost:
        with pytest.raises(OperationLostError, match=f"seq {future.seq} of"):
            future.result(timeout=20)


def test_who_waits_by_the_id_of_what_is_lost(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    _, lost = accepted(tc, 2)
    session = lost._session
    operation_id = session.io.run(session.operations.identified(lost))
    assert operation_id
    with ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as other:
        followed = other.future(operation_id)
        server.stop()
        server.forget(1)
        server.start()
        with pytest.raises(OperationLostError):
            followed.result(timeout=20)
