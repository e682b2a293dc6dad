"""The contract of OperationFuture, over real gRPC."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import Any

import pytest
from fake_server import FakeCoordinator

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault
from tensafe_client import (
    ForwardBackwardResult,
    OperationCancelledError,
    OperationNotFoundError,
    OperationTimeoutError,
    ServiceClient,
    TenSafeError,
    TrainingClient,
    WindowPoisonedError,
)

Batch = dict[str, list[list[int]]]


def test_result_is_typed_and_stays(tc: TrainingClient, batch: Batch) -> None:
    future = tc.forward_backward(batch)
    result = future.result(timeout=10)
    assert isinstance(result, ForwardBackwardResult)
    assert (result.loss, result.grad_norm, result.tokens_processed) == (2.49, 1.5, 4)
    assert [piece.tolist() for piece in result.logprobs] == [[-5, -6], [-8, -9]]
    assert future.result() is result
    assert future.exception() is None
    assert future.done()
    assert not future.cancelled()


def test_repr_tells_the_story(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    server.gate.clear()
    future = tc.optim_step()
    assert repr(future) == f"<OperationFuture optim_step {tc.run_id} seq=1 op-? sending>"
    assert not future.running()
    server.gate.set()
    with pytest.raises(OperationTimeoutError):
        future.result(timeout=0.3)
    assert repr(future) == f"<OperationFuture optim_step {tc.run_id} seq=1 op-1 accepted>"
    assert not future.running()
    server.stored["op-1"].operation.state = ops.OPERATION_STATE_RUNNING
    assert future.running()
    server.release()
    future.result(timeout=10)
    assert repr(future) == f"<OperationFuture optim_step {tc.run_id} seq=1 op-1 succeeded>"
    assert not future.running()


def test_failures_are_typed(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.fail[1] = TenSafeFault("WINDOW_POISONED", "a forward_backward failed", run_id="run-1")
    future = tc.optim_step()
    with pytest.raises(WindowPoisonedError) as caught:
        future.result(timeout=10)
    assert caught.value.reason == "WINDOW_POISONED"
    assert caught.value.resource == "run-1"
    assert "Remedy" in str(caught.value)
    assert future.exception() is caught.value
    assert "failed: WINDOW_POISONED" in repr(future)
    assert tc.optim_step().result(timeout=10).step == 1


def test_a_refused_operation_fails_alone(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.refuse[2] = TenSafeFault("INVALID_ARGUMENT", "learning_rate is NaN", field="lr")
    futures = [tc.optim_step() for _ in range(3)]
    assert futures[0].result(timeout=10).step == 1
    with pytest.raises(TenSafeError, match="NaN"):
        futures[1].result(timeout=10)
    assert futures[1].operation_id is not None
    assert futures[2].result(timeout=10).step == 2


def test_a_timeout_leaves_the_operation_running(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    future = tc.optim_step()
    with pytest.raises(OperationTimeoutError) as caught:
        future.result(timeout=0.3)
    assert isinstance(caught.value, TimeoutError)
    assert "goes on" in str(caught.value)
    assert "op-1" in str(caught.value)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0)
    assert not future.done()
    server.release()
    assert future.result(timeout=10).step == 1


def test_wait_and_as_completed(tc: TrainingClient, batch: Batch, server: FakeCoordinator) -> None:
    server.hold = True
    futures: list[Any] = [tc.forward_backward(batch), tc.optim_step(), tc.optim_step()]
    futures[-1].cancel()
    server.release(1)
    done, pending = concurrent.futures.wait(futures[:2], 10, concurrent.futures.FIRST_COMPLETED)
    assert (len(done), len(pending)) == (1, 1)
    server.release()
    assert set(concurrent.futures.as_completed(futures, timeout=10)) == set(futures)
    assert not concurrent.futures.wait(futures, timeout=10).not_done


def test_cancel_is_true_only_if_it_never_ran(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    first, second = tc.optim_step(), tc.optim_step()
    assert second.cancel()
    assert second.cancelled()
    assert second.done()
    with pytest.raises(OperationCancelledError) as caught:
        second.result()
    assert isinstance(caught.value, concurrent.futures.CancelledError)
    with pytest.raises(concurrent.futures.CancelledError):
        second.exception()
    assert "cancelled" in repr(second)
    server.release()
    assert first.result(timeout=10).step == 1
    assert not first.cancel()
    assert second.cancel()


def test_cancel_of_one_that_waits_to_be_sent(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    server.gate.clear()
    futures = [tc.optim_step() for _ in range(3)]
    cancelled: list[bool] = []
    thread = threading.Thread(target=lambda: cancelled.append(futures[1].cancel()))
    thread.start()
    server.gate.set()
    thread.join(timeout=10)
    assert cancelled == [True]
    server.release()
    assert [futures[0].result(10).step, futures[2].result(10).step] == [1, 2]
    assert sorted(seq for seqs in server.batches for seq in seqs) == [1, 2, 3]


def test_callbacks(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.hold = True
    future = tc.optim_step()
    called: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def submit_another(done: concurrent.futures.Future[Any]) -> None:
        # Submitting is fine on the I/O thread; blocking there would never end.
        following = tc.optim_step()
        with pytest.raises(RuntimeError, match="callback"):
            following.result(timeout=5)
        with pytest.raises(RuntimeError, match="callback"):
            tc.refresh()
        called.set_result((done.result().step, following))

    future.add_done_callback(submit_another)
    server.release()
    step, following = called.result(timeout=10)
    assert step == 1
    assert following.result(timeout=10).step == 2
    late: list[Any] = []
    future.add_done_callback(late.append)
    assert late == [future]


def test_await_from_any_loop(tc: TrainingClient, server: FakeCoordinator) -> None:
    async def both() -> list[int]:
        results = await asyncio.gather(tc.optim_step(), tc.optim_step())
        return [result.step for result in results]

    assert asyncio.run(both()) == [1, 2]
    assert asyncio.run(both()) == [3, 4]


def test_an_await_that_ends_early_cancels_nothing(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    future = tc.optim_step()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(future), timeout=0.2)
        task = asyncio.create_task(_awaited(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert not future.done()
    server.release()
    assert future.result(timeout=10).step == 1


def test_a_cancelled_operation_does_not_cancel_who_awaits_it(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.hold = True
    future = tc.optim_step()

    async def wait() -> str:
        waiting = asyncio.create_task(_awaited(future))
        assert await asyncio.to_thread(future.cancel)
        with pytest.raises(OperationCancelledError):
            await waiting
        return "cancelled" if waiting.cancelled() else "raised"

    assert asyncio.run(wait()) == "raised"


async def _awaited(future: Any) -> Any:
    return await future


def test_a_handle_rebuilt_elsewhere(
    client: ServiceClient, tc: TrainingClient, batch: Batch, server: FakeCoordinator
) -> None:
    done = tc.forward_backward(batch)
    done.result(timeout=10)
    again = client.future(str(done.operation_id))
    assert (again.kind, again.run_id, again.seq) == ("forward_backward", tc.run_id, 1)
    assert again.result(timeout=10).loss == 2.49
    assert len(again.result().logprobs) == 1
    server.hold = True
    waiting = tc.optim_step()
    with pytest.raises(OperationTimeoutError):
        waiting.result(timeout=0.2)
    with ServiceClient(f"127.0.0.1:{server.port}", api_key="ts_test") as other:
        rebuilt = other.future(str(waiting.operation_id))
        assert not rebuilt.done()
        server.cut_watches()  # also answers the call that waits, with an unfinished operation
        server.release()
        assert rebuilt.result(timeout=10).step == 1
    with pytest.raises(OperationNotFoundError, match="op-99"):
        client.future("op-99")
