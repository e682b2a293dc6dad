"""A run's order: retries, conflicts, gaps, cancels, and what they do to the window."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import grpc
import pytest
from harness.wire import RawClient, batch, forward_backward, int32, int64, raw_client
from local_service import LocalService

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import operations_pb2_grpc
from tensafe.v1 import training_pb2 as pb
from tensafe_client import (
    BatchError,
    Datum,
    InvalidArgumentError,
    OperationCancelledError,
    SequenceConflictError,
    ServiceClient,
    WindowPoisonedError,
)
from tensafe_client.errors import from_status


@pytest.fixture
def raw(service: LocalService) -> Iterator[RawClient]:
    with raw_client(service.target, service.api_key) as client:
        yield client


@pytest.fixture
def client(service: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(service.target, api_key=service.api_key) as opened:
        yield opened


def new_run(raw: RawClient, **config: object) -> str:
    answer = raw.stub.CreateRun(
        pb.CreateRunRequest(
            request_id=uuid.uuid4().hex,
            config=pb.RunConfig(model_ref="any", **config),  # type: ignore[arg-type]
        ),
        metadata=raw.metadata,
    )
    return str(answer.run.id)


def passing(run_id: str, seq: int, token: int = 1) -> pb.OperationSpec:
    content = batch(int64([0, 2]), int32([token, 2]), target_tokens=int32([2, 3]))
    return forward_backward(run_id, seq, content)


def stepping(run_id: str, seq: int, rate: float | None = None) -> pb.OperationSpec:
    return pb.OperationSpec(run_id=run_id, seq=seq, optim_step=pb.OptimStep(learning_rate=rate))


def submit(raw: RawClient, *specs: pb.OperationSpec) -> list[pb.SubmitOutcome]:
    answer = raw.stub.SubmitBatch(
        pb.SubmitBatchRequest(operations=specs), metadata=raw.metadata, timeout=30
    )
    return list(answer.outcomes)


def ended(client: ServiceClient, operation_id: str) -> object:
    return client.future(operation_id).exception(30) or client.future(operation_id).result(30)


def test_a_retry_gets_the_same_operation_and_adds_no_gradient(
    raw: RawClient, client: ServiceClient
):
    run = new_run(raw)
    [first] = submit(raw, passing(run, 1))
    [again] = submit(raw, passing(run, 1))
    assert first.operation_id == again.operation_id
    submit(raw, stepping(run, 2))
    [late] = submit(raw, passing(run, 1))  # after it has finished, too
    assert late.operation_id == first.operation_id
    assert raw.next_seq(run) == 3


def test_the_same_seq_with_another_content_is_a_conflict(raw: RawClient):
    run = new_run(raw)
    submit(raw, passing(run, 1))
    error = raw.submit(passing(run, 1, token=9))
    assert error is not None
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "SEQ_CONFLICT")


@pytest.mark.parametrize("finished", [False, True])
def test_what_follows_a_conflict_in_its_request_is_refused_with_it(
    raw: RawClient, client: ServiceClient, finished: bool
):
    run, other = new_run(raw), new_run(raw)
    [first] = submit(raw, passing(run, 1))
    if finished:
        client.future(first.operation_id).result(30)
    mine = [passing(run, 1, token=9), passing(run, 2), stepping(run, 3), stepping(run, 2)]
    outcomes = submit(raw, *mine, passing(other, 1))
    reasons = [from_status(o.error).reason if o.HasField("error") else "" for o in outcomes]
    assert reasons == ["SEQ_CONFLICT"] * 4 + [""]
    assert raw.next_seq(run) == 2
    assert not submit(raw, passing(run, 2))[0].HasField("error")


@pytest.mark.parametrize("alike", [False, True])
def test_a_client_that_another_has_overtaken_stops_until_it_attaches(
    service: LocalService, client: ServiceClient, alike: bool
):
    """Whether the two sent the same or not: nobody steps on a part of what it meant to add up."""
    batches = [[Datum([1, 2, 3], [2, 3, number], [1.0] * 3)] for number in (4, 5, 6)]
    with ServiceClient(service.target, api_key=service.api_key) as second:
        stale = client.create_training_client({"model_ref": "mock", "seed": 1})
        leading = second.training_client(stale.run_id)
        leading.forward_backward(batches[0] if alike else batches[2]).result(30)
        assert leading.optim_step().result(30).step == 1
        with pytest.raises(SequenceConflictError):
            stale.forward_backward(batches[0]).result(30)
        with pytest.raises(SequenceConflictError, match="another client has driven run"):
            stale.forward_backward(batches[1])
        with pytest.raises(SequenceConflictError, match="attach again"):
            stale.optim_step()
        assert leading.forward_backward(batches[1]).result(30)
        assert leading.optim_step().result(30).step == 2
        again = client.training_client(stale.run_id)
        again.forward_backward(batches[2])
        assert again.optim_step().result(30).step == 3


def test_a_refused_operation_takes_its_seq_and_is_on_record(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    outcomes = submit(raw, stepping(run, 1, rate=float("nan")), passing(run, 2), stepping(run, 3))
    assert [outcome.HasField("error") for outcome in outcomes] == [True, False, False]
    assert client.future(outcomes[2].operation_id).result(30).step == 1
    records = {record.seq: record for record in client.operations(run)}
    assert records[1].state == "failed"
    [again] = submit(raw, stepping(run, 1, rate=float("nan")))
    assert again.operation_id == outcomes[0].operation_id
    assert again.HasField("error")


def test_a_refused_forward_backward_poisons_only_its_window(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    empty = batch(int64([0]), int32([]))
    outcomes = submit(
        raw,
        passing(run, 1),
        forward_backward(run, 2, empty),
        stepping(run, 3),
        passing(run, 4),
        stepping(run, 5),
    )
    closing = client.future(outcomes[2].operation_id).exception(30)
    assert closing is not None
    assert closing.reason == "WINDOW_POISONED"  # type: ignore[attr-defined]
    assert client.future(outcomes[4].operation_id).result(30).step == 1


def test_a_loop_that_passes_over_a_bad_batch_never_steps_on_half_a_gradient(client: ServiceClient):
    good = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}
    run = client.create_training_client({"model_ref": "any", "gradient_accumulation_steps": 2})
    closing = []
    for number, content in enumerate([good, {"input_ids": [[1], [2, 3]]}, good, good]):
        try:
            run.forward_backward(content)
        except BatchError:
            assert number == 1
        closing.append(run.optim_step())
    assert not closing[0].result(30).applied
    with pytest.raises(WindowPoisonedError):
        closing[1].result(30)
    assert closing[3].result(30).step == 1


@pytest.mark.parametrize(
    ("broken", "poisons"),
    [
        (pb.OperationSpec(), True),  # it may have been meant for a gradient
        (pb.OperationSpec(optim_step=pb.OptimStep(), request_id="r" * 20), False),
        (pb.OperationSpec(sample=pb.Sample(weights=pb.SampleWeights(base_model="any"))), False),
    ],
    ids=["no operation", "a request id beside the seq", "a seq where there is no order"],
)
def test_whatever_has_a_place_is_recorded_there(
    raw: RawClient, client: ServiceClient, broken: pb.OperationSpec, poisons: bool
):
    """Else what follows would wait for it."""
    run = new_run(raw)
    broken = pb.OperationSpec.FromString(broken.SerializeToString())
    broken.run_id, broken.seq = run, 1
    [refused] = submit(raw, broken)
    assert refused.HasField("error")
    operation = client.operation(refused.operation_id)
    assert (operation.state, operation.seq) == ("failed", 1)
    [again] = submit(raw, broken)
    assert (again.operation_id, again.error) == (refused.operation_id, refused.error)
    outcomes = submit(raw, passing(run, 2), stepping(run, 3), passing(run, 4), stepping(run, 5))
    closing = client.future(outcomes[1].operation_id).exception(30)
    assert isinstance(closing, WindowPoisonedError) == poisons
    assert client.future(outcomes[3].operation_id).result(30).step == 2 - poisons


def test_operations_wait_for_an_earlier_seq(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    [step] = submit(raw, stepping(run, 2))
    state = client.operations(run)[0].state
    assert state == "queued"
    submit(raw, passing(run, 1))
    assert client.future(step.operation_id).result(30).step == 1


def test_attaching_closes_a_gap_that_nobody_will_fill(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    [early] = submit(raw, stepping(run, 3))
    assert raw.next_seq(run) == 4
    failure = client.future(early.operation_id).exception(30)
    assert failure is not None
    assert failure.reason == "SEQ_GAP"  # type: ignore[attr-defined]
    outcomes = submit(raw, passing(run, 4), stepping(run, 5), passing(run, 6), stepping(run, 7))
    # What was missing may have been a gradient: the window that it fell into is not trusted.
    poisoned = client.future(outcomes[1].operation_id).exception(30)
    assert poisoned is not None
    assert poisoned.reason == "WINDOW_POISONED"  # type: ignore[attr-defined]
    assert client.future(outcomes[3].operation_id).result(30).step == 1


def test_a_cancelled_operation_never_runs(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    [waiting] = submit(raw, passing(run, 2))  # seq 1 is missing, so it cannot start
    future = client.future(waiting.operation_id)
    assert future.cancel()
    assert future.cancelled()
    outcomes = submit(raw, passing(run, 1), stepping(run, 3), passing(run, 4), stepping(run, 5))
    poisoned = client.future(outcomes[1].operation_id).exception(30)
    assert poisoned is not None
    assert poisoned.reason == "WINDOW_POISONED"  # type: ignore[attr-defined]
    assert client.future(outcomes[3].operation_id).result(30).step == 1


def test_a_finished_operation_cannot_be_cancelled(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    [done] = submit(raw, passing(run, 1))
    client.future(done.operation_id).result(30)
    assert client.cancel(done.operation_id) is False


def test_creating_a_run_twice_under_one_request_makes_one(raw: RawClient):
    request = pb.CreateRunRequest(request_id=uuid.uuid4().hex, config=pb.RunConfig(model_ref="any"))
    made = [raw.stub.CreateRun(request, metadata=raw.metadata).run for _ in range(2)]
    assert made[0] == made[1]
    request.config.model_ref = "other"
    with pytest.raises(grpc.RpcError) as raised:
        raw.stub.CreateRun(request, metadata=raw.metadata)
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]


def test_waiting_answers_when_the_operation_ends(raw: RawClient, service: LocalService):
    run = new_run(raw)
    [late] = submit(raw, passing(run, 2))
    with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
        stub = operations_pb2_grpc.OperationsServiceStub(channel)
        waiting = stub.WaitOperation.future(
            ops.WaitOperationRequest(operation_id=late.operation_id), metadata=raw.metadata
        )
        submit(raw, passing(run, 1))
        operation = waiting.result(30).operation
    assert operation.state == ops.OPERATION_STATE_SUCCEEDED


def test_another_clients_like_operation_is_not_taken_for_ones_own(service: LocalService):
    with (
        ServiceClient(service.target, api_key=service.api_key) as one,
        ServiceClient(service.target, api_key=service.api_key) as other,
    ):
        first = one.create_training_client({"model_ref": "any"})
        second = other.training_client(first.run_id)
        assert first.save_state_async().result(30).artifact_id
        with pytest.raises(SequenceConflictError, match="used by another client"):
            second.save_state_async().result(30)


def test_a_bad_item_fails_alone(raw: RawClient, client: ServiceClient):
    run = new_run(raw)
    bad = pb.OperationSpec(
        run_id=run,
        request_id=uuid.uuid4().hex,
        sample=pb.Sample(
            prompts=[pb.Prompt(text="x")],
            weights=pb.SampleWeights(version=pb.PinnedVersion(step=2**63)),
        ),
    )
    outcomes = submit(raw, passing(run, 1), bad, stepping(run, 2))
    assert [outcome.HasField("error") for outcome in outcomes] == [False, True, False]
    assert client.future(outcomes[2].operation_id).result(30).step == 1


def test_pages_of_runs_neither_repeat_nor_skip(raw: RawClient):
    made = [new_run(raw) for _ in range(7)]
    first = raw.stub.ListRuns(pb.ListRunsRequest(page_size=3), metadata=raw.metadata)
    raw.stub.DeleteRun(
        pb.DeleteRunRequest(run_id=made[-1], request_id=uuid.uuid4().hex), metadata=raw.metadata
    )
    new_run(raw)
    second = raw.stub.ListRuns(
        pb.ListRunsRequest(page_size=4, page_token=first.next_page_token), metadata=raw.metadata
    )
    assert [run.id for run in [*first.runs, *second.runs]] == made[::-1]


def test_a_request_id_deletes_one_run_only(raw: RawClient):
    one, other = new_run(raw), new_run(raw)
    request_id = uuid.uuid4().hex
    for _ in range(2):
        answer = raw.stub.DeleteRun(
            pb.DeleteRunRequest(run_id=one, request_id=request_id), metadata=raw.metadata
        )
        assert answer.run.status == pb.RUN_STATUS_DELETED
    with pytest.raises(grpc.RpcError) as raised:
        raw.stub.DeleteRun(
            pb.DeleteRunRequest(run_id=other, request_id=request_id), metadata=raw.metadata
        )
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]


def test_a_delete_cancels_what_was_accepted_just_before_it(raw: RawClient, client: ServiceClient):
    """Of 130 unfinished ones the gate makes a group of what comes within 5 ms."""
    behind_a_gap = new_run(raw)
    submit(raw, *(stepping(behind_a_gap, seq) for seq in range(2, 132)))
    accepted = 0
    for _ in range(20):
        run_id = new_run(raw)
        submitting = raw.stub.SubmitBatch.future(
            pb.SubmitBatchRequest(operations=[stepping(run_id, 2)]), metadata=raw.metadata
        )
        raw.stub.DeleteRun(
            pb.DeleteRunRequest(run_id=run_id, request_id=uuid.uuid4().hex), metadata=raw.metadata
        )
        [outcome] = submitting.result().outcomes
        if not outcome.HasField("error"):
            accepted += 1
            with pytest.raises(OperationCancelledError):
                client.future(outcome.operation_id).result(30)
    assert accepted


def test_a_request_id_cancels_one_operation_only(raw: RawClient, service: LocalService):
    """Both wait for a seq that is missing."""
    run_id, request_id = new_run(raw), uuid.uuid4().hex
    first, other = submit(raw, stepping(run_id, 3), stepping(run_id, 4))

    def cancel(operation_id: str) -> ops.Operation:
        request = ops.CancelOperationRequest(operation_id=operation_id, request_id=request_id)
        with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
            stub = operations_pb2_grpc.OperationsServiceStub(channel)
            return stub.CancelOperation(request, metadata=raw.metadata).operation

    for _ in range(2):
        assert cancel(first.operation_id).state == ops.OPERATION_STATE_CANCELLED
    with pytest.raises(grpc.RpcError) as raised:
        cancel(other.operation_id)
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]


def test_a_filter_that_is_empty_is_refused_and_not_passed_over(client: ServiceClient):
    for listing in (client.operations, client.artifacts):
        with pytest.raises(InvalidArgumentError, match="run_id"):
            listing("")
