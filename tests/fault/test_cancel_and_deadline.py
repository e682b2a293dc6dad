"""What a cancel and a deadline do to an operation and to the gradient, in every state it may be in.

The table in docs/operations.md names these tests.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from harness.faulty_fleet import FaultyCluster
from harness.faulty_worker import GATE
from harness.wire import batch as raw_batch
from harness.wire import forward_backward, int32, int64, raw_client

from tensafe.v1 import training_pb2 as pb
from tensafe_client import (
    Datum,
    DeadlineExceededError,
    InvalidArgumentError,
    OperationCancelledError,
    OperationFuture,
    ServiceClient,
    TrainingClient,
)

SOON_S = 0.4


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCluster]:
    with FaultyCluster(tmp_path_factory.mktemp("withdrawals")) as cluster:
        cluster.start()
        cluster.add_faulty_worker()
        yield cluster


@pytest.fixture(scope="module")
def api_key(fleet: FaultyCluster) -> str:
    return fleet.new_tenant("tenant")


@pytest.fixture
def client(fleet: FaultyCluster, api_key: str) -> Iterator[ServiceClient]:
    with ServiceClient(fleet.target, api_key=api_key) as client:
        yield client


@pytest.fixture
def tc(client: ServiceClient) -> TrainingClient:
    return client.create_training_client({"model_ref": "any", "seed": 1})


def batch(first: int = 5) -> list[Datum]:
    return [Datum(tokens=[first, 6, 7], target_tokens=[6, 7, 8])]


def wait_state(client: ServiceClient, future: OperationFuture, state: str) -> None:
    while True:
        operation_id = future.operation_id
        if operation_id and client.operation(operation_id).state == state:
            return
        assert not future.done()


def block(fleet: FaultyCluster, client: ServiceClient) -> OperationFuture:
    """Keeps the only worker busy until its gate is opened."""
    blocker = client.create_training_client({"model_ref": "any", "seed": 9})
    future = blocker.forward_backward(batch(GATE))
    wait_state(client, future, "running")
    return future


def withdraw(way: str, submit: Callable[..., OperationFuture]) -> OperationFuture:
    """Submits an operation and ends it before it began, in one of the two ways."""
    if way == "deadline":
        future = submit(deadline_s=SOON_S)
        with pytest.raises(DeadlineExceededError, match="it never ran"):
            future.result(30)
        assert not future.cancelled()
    else:
        future = submit()
        assert future.cancel()
        with pytest.raises(OperationCancelledError):
            future.result(30)
    return future


def assert_poisoned(tc: TrainingClient) -> None:
    """The closing step fails, and the next window is clean."""
    assert tc.optim_step().exception(30).reason == "WINDOW_POISONED"  # type: ignore[union-attr]
    tc.forward_backward(batch())
    assert tc.optim_step().result(30).step == 1


WAYS = pytest.mark.parametrize("way", ["cancel", "deadline"])


@WAYS
def test_sent_to_a_worker_but_not_begun(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, way: str
):
    busy = block(fleet, client)
    good = tc.forward_backward(batch())
    future = withdraw(way, lambda **options: tc.forward_backward(batch(), **options))
    fleet.open_gate(fleet.workers[0])
    assert busy.result(30)
    assert good.result(30)
    assert client.operation(future.operation_id or "").state == "cancelled"
    assert_poisoned(tc)


@WAYS
def test_waiting_for_a_worker(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, way: str
):
    [worker] = fleet.workers
    worker.kill()
    withdraw(way, lambda **options: tc.forward_backward(batch(), **options))
    fleet.revive(worker)
    assert_poisoned(tc)


@WAYS
def test_waiting_for_an_earlier_seq(fleet: FaultyCluster, client: ServiceClient, way: str, api_key):
    with raw_client(fleet.target, api_key) as raw:
        request = pb.CreateRunRequest(
            request_id=uuid.uuid4().hex, config=pb.RunConfig(model_ref="any", seed=1)
        )
        run = raw.stub.CreateRun(request, metadata=raw.metadata).run.id
        content = raw_batch(int64([0, 2]), int32([1, 2]), target_tokens=int32([2, 3]))
        early = forward_backward(run, 2, content)
        if way == "deadline":
            early.time_to_live.FromMilliseconds(int(SOON_S * 1e3))
        answer = raw.stub.Submit(pb.SubmitRequest(operation=early), metadata=raw.metadata)
        future = client.future(answer.operation.id)
        if way == "cancel":
            assert future.cancel()
        kind = DeadlineExceededError if way == "deadline" else OperationCancelledError
        with pytest.raises(kind):
            future.result(30)
        assert raw.submit(forward_backward(run, 1, content)) is None
        assert_poisoned(client.training_client(run))


@WAYS
def test_running_goes_to_its_end(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, way: str
):
    running = tc.forward_backward(batch(GATE), deadline_s=SOON_S if way == "deadline" else None)
    wait_state(client, running, "running")
    assert running.running()
    if way == "cancel":
        assert not running.cancel()
    else:  # a deadline behind it, which passes later
        withdraw(way, tc.optim_step)
    fleet.open_gate(fleet.workers[0])
    assert running.result(30).loss == pytest.approx(2.49)
    assert tc.optim_step().result(30).step == 1


@WAYS
def test_ended_stays_as_it_is(client: ServiceClient, tc: TrainingClient, way: str):
    ended = tc.forward_backward(batch(), deadline_s=SOON_S if way == "deadline" else None)
    assert ended.result(30)
    if way == "cancel":
        assert not client.cancel(ended.operation_id or "")
    assert client.operation(ended.operation_id or "").state == "succeeded"
    assert tc.optim_step().result(30).step == 1


@WAYS
def test_a_withdrawn_optim_step_leaves_the_window_open(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, way: str
):
    busy = block(fleet, client)
    tc.forward_backward(batch())
    withdraw(way, tc.optim_step)
    fleet.open_gate(fleet.workers[0])
    assert busy.result(30)
    assert tc.optim_step().result(30).step == 1


def test_a_cancel_whose_worker_is_lost_before_it_answers(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient
):
    """The worker is frozen, so that it cannot answer; then it is killed."""
    import threading

    [worker] = fleet.workers
    busy = block(fleet, client)
    waiting = tc.forward_backward(batch())
    while waiting.operation_id is None:
        assert not waiting.done()
    worker.signal(signal.SIGSTOP)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(waiting.cancel()))
    asking.start()
    asking.join(0.3)
    assert asking.is_alive()  # nobody knows yet
    worker.kill()
    asking.join(30)
    assert answers == [True]
    fleet.open_gate(worker)
    fleet.revive(worker)
    assert busy.result(30)
    assert_poisoned(tc)


def test_a_deadline_that_passes_while_the_coordinator_is_down(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient
):
    [worker] = fleet.workers
    worker.kill()
    late = tc.forward_backward(batch(), deadline_s=SOON_S)
    accepted = time.monotonic()
    while late.operation_id is None:
        assert not late.done()
    fleet.coordinator.kill()
    fleet.coordinator.start()
    fleet.coordinator.wait_ready()
    fleet.revive(worker)
    with pytest.raises(DeadlineExceededError):
        late.result(30)
    assert time.monotonic() - accepted >= SOON_S
    assert_poisoned(tc)


@pytest.mark.parametrize("seconds", [0, -1, 1e9, float("nan")])
def test_a_deadline_that_is_none_is_refused_before_anything_is_sent(
    tc: TrainingClient, seconds: float
):
    with pytest.raises((InvalidArgumentError, ValueError)):
        tc.optim_step(deadline_s=seconds)
    tc.forward_backward(batch())
    assert tc.optim_step().result(30).step == 1


def test_an_operation_without_a_run_has_a_deadline_too(fleet: FaultyCluster, client: ServiceClient):
    [worker] = fleet.workers
    busy = block(fleet, client)
    late = client.sample_async("x", model="any", deadline_s=SOON_S)
    with pytest.raises(DeadlineExceededError):
        late.result(30)
    fleet.open_gate(worker)
    assert busy.result(30)
    assert client.sample("x", model="any", deadline_s=30).samples


def test_more_withdrawn_operations_than_a_worker_takes_hold_nothing_up(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient
):
    busy = block(fleet, client)
    withdrawn = [tc.forward_backward(batch()) for _ in range(30)]
    assert all(future.cancel() for future in reversed(withdrawn))
    fleet.open_gate(fleet.workers[0])
    assert busy.result(30)
    assert_poisoned(tc)
