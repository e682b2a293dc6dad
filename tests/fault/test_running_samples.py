"""Samples that run while training goes on, and while workers, streams and coordinators are lost:
each token comes once, from the weights of its sample's place, and a cancel stops it at once."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.cluster import Process
from harness.faulty_fleet import FaultyCluster
from harness.faulty_worker import GATE
from harness.proxy import TcpProxy
from local_service import isolated_environment, tensafe_command

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import operations_pb2_grpc
from tensafe_client import (
    Datum,
    DeadlineExceededError,
    OperationCancelledError,
    SampleDivergedError,
    SampleStream,
    ServiceClient,
    TrainingClient,
)

BEGUN = 5
"""Tokens that a gated sample draws before it waits."""
DEADLINE_S = 3.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FaultyCluster]:
    with FaultyCluster(tmp_path, "--snapshot-steps", "1", "--grace-s", "5") as cluster:
        cluster.start()
        yield cluster


@pytest.fixture
def client(fleet: FaultyCluster) -> Iterator[ServiceClient]:
    with ServiceClient(fleet.target, api_key=fleet.new_tenant("tenant")) as client:
        yield client


@pytest.fixture
def worker(fleet: FaultyCluster) -> Process:
    return fleet.add_faulty_worker()


@pytest.fixture
def tc(client: ServiceClient, worker: Process) -> TrainingClient:
    return client.create_training_client({"model_ref": "any", "seed": 1})


def batch() -> list[Datum]:
    return [Datum(tokens=[5, 6, 7], target_tokens=[6, 7, 8])]


def train(tc: TrainingClient, steps: int) -> list[int]:
    pairs = [(tc.forward_backward(batch()), tc.optim_step()) for _ in range(steps)]
    assert all(passed.result(60) for passed, _ in pairs)
    return [updated.result(60).step for _, updated in pairs]


def begin(tc: TrainingClient, **options) -> tuple[SampleStream, str]:
    """A sample that has drawn its first tokens and waits, and their text."""
    stream = tc.sample(f"gate {BEGUN}", stream=True, **options)
    text = ""
    while len(text) < BEGUN:
        text += next(stream).text
    return stream, text


def text_at(step: int) -> str:
    return f" [Mock completion for step {step}]"


def assert_right(tc: TrainingClient, stream: SampleStream, text: str, step: int) -> None:
    """All of it came, once, and from the weights of its place."""
    text += "".join(chunk.text for chunk in stream)
    result = stream.result(60)
    assert text == result.samples[0].completion == text_at(step)
    assert result.model_step == step
    assert tc.refresh().replay_mismatches == 0


def wait_snapshot(client: ServiceClient, tc: TrainingClient, seq: int) -> None:
    while client.run(tc.run_id).snapshot_seq < seq:
        assert client.run(tc.run_id).status == "active"


def test_training_goes_on_while_a_sample_runs(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    tc.forward_backward(batch())
    tc.optim_step()  # not awaited: the sample comes behind it, and sees it
    stream, text = begin(tc)
    assert client.operation(stream.future.operation_id or "").state == "running"
    assert train(tc, 3) == [2, 3, 4]
    wait_snapshot(client, tc, 9)  # it holds none up
    late = tc.sample("x")
    assert late.model_step == 4
    fleet.let_samples_go(worker)
    assert_right(tc, stream, text, 1)


def test_a_lost_worker_begins_it_again_on_the_weights_of_its_place(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    train(tc, 2)
    stream, text = begin(tc)
    train(tc, 3)
    wait_snapshot(client, tc, 11)  # beyond the sample: a recovery must begin before it
    saved = tc.save_state_async()
    saved.result(60)
    heir = fleet.add_faulty_worker()
    fleet.let_samples_go(heir)
    worker.kill()
    assert train(tc, 1) == [6]
    assert_right(tc, stream, text, 2)
    assert train(tc, 1) == [7]


def test_the_coordinator_is_killed_while_it_runs(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    train(tc, 1)
    stream, text = begin(tc)
    train(tc, 2)
    fleet.coordinator.kill()
    fleet.coordinator.start()
    fleet.coordinator.wait_ready()
    assert train(tc, 1) == [4]
    fleet.let_samples_go(worker)
    assert_right(tc, stream, text, 1)


def test_both_are_killed_while_it_runs(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    train(tc, 1)
    stream, text = begin(tc)
    train(tc, 2)
    wait_snapshot(client, tc, 7)
    fleet.coordinator.kill()
    worker.kill()
    fleet.coordinator.start()
    fleet.coordinator.wait_ready()
    fleet.let_samples_go(worker)
    fleet.revive(worker)
    assert train(tc, 1) == [4]
    assert_right(tc, stream, text, 1)


def test_a_worker_that_was_cut_off_tells_it_from_the_first_token(
    fleet: FaultyCluster, client: ServiceClient
):
    proxy = TcpProxy(fleet.port)
    worker = fleet.add_faulty_worker(port=proxy.port)
    tc = client.create_training_client({"model_ref": "any", "seed": 1})
    train(tc, 1)
    stream, text = begin(tc)
    assert proxy.cut()
    worker.wait_said("connected to ", count=2)
    assert train(tc, 1) == [2]
    assert proxy.cut()
    fleet.let_samples_go(worker)
    assert_right(tc, stream, text, 1)
    proxy.close()


def test_another_outcome_is_an_error_of_the_stream_and_the_result_is_right(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    stream, _ = begin(tc)
    late = tc.sample_async(f"gate {BEGUN}")
    text = "x" * (len(text_at(0)) - 2)
    heir = fleet.add_faulty_worker(text=text)
    fleet.let_samples_go(heir)
    worker.kill()
    with pytest.raises(SampleDivergedError, match="from token 2 on"):
        list(stream)
    assert stream.result(60).samples[0].completion == " [" + text
    assert late.result(60).samples[0].completion == " [" + text


def test_a_cancel_stops_it_at_once_and_it_gives_nothing(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    train(tc, 1)
    stream, _ = begin(tc)
    beside, text = begin(tc)
    assert stream.cancel()
    with pytest.raises(OperationCancelledError):
        next(stream)
    assert client.operation(stream.future.operation_id or "").state == "cancelled"
    assert not beside.future.done()
    assert train(tc, 1) == [2]
    fleet.let_samples_go(worker)
    assert_right(tc, beside, text, 1)


def test_leaving_the_loop_stops_it(client: ServiceClient, tc: TrainingClient):
    for chunk in tc.sample(f"gate {BEGUN}", stream=True):
        assert chunk.text
        break
    [operation] = client.operations(tc.run_id, limit=1)
    assert operation.state == "cancelled"
    assert operation.error is not None
    assert "was cancelled" in operation.error.message


def test_a_cancel_whose_worker_is_lost_before_it_answers(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    stream, _ = begin(tc)
    worker.signal(signal.SIGSTOP)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(stream.cancel()))
    asking.start()
    asking.join(0.3)
    assert asking.is_alive()  # nobody knows yet
    worker.kill()
    asking.join(30)
    assert answers == [True]
    fleet.revive(worker)
    assert train(tc, 1) == [1]


def test_cancels_that_race_with_the_end_have_one_outcome(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    fleet.let_samples_go(worker)
    futures = [tc.sample_async("x") for _ in range(40)]
    answers = [future.cancel() for future in futures]
    for future, answer in zip(futures, answers, strict=True):
        assert future.cancelled() is answer
        if not answer:
            assert future.result(30).samples
        state = client.operation(future.operation_id or "").state
        assert state == ("cancelled" if answer else "succeeded")
    assert train(tc, 1) == [1]


def test_a_deadline_does_not_stop_what_has_begun(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    stream, text = begin(tc, deadline_s=DEADLINE_S)
    other = client.create_training_client({"model_ref": "any"})
    busy = other.forward_backward([Datum(tokens=[GATE, 6], target_tokens=[6, 7])])
    late = other.optim_step(deadline_s=DEADLINE_S)  # accepted later, and so expired later
    with pytest.raises(DeadlineExceededError):
        late.result(30)
    fleet.open_gate(worker)
    assert busy.result(30)
    fleet.let_samples_go(worker)
    assert_right(tc, stream, text, 0)


def test_a_tenants_streams_beyond_its_limit_wait_and_others_do_not(tmp_path: Path):
    with FaultyCluster(tmp_path, "--tenant-streams", "1") as fleet:
        fleet.start()
        worker = fleet.add_faulty_worker()
        with (
            ServiceClient(fleet.target, api_key=fleet.new_tenant("one")) as one,
            ServiceClient(fleet.target, api_key=fleet.new_tenant("two")) as two,
        ):
            runs = [c.create_training_client({"model_ref": "any"}) for c in (one, one, two)]
            open_stream, begun = begin(runs[0])
            other = runs[2].sample("x", stream=True)
            assert "".join(chunk.text for chunk in other) == text_at(0)
            waiting = runs[1].sample("x", stream=True)
            assert waiting.result(60).samples[0].completion == text_at(0)
            texts: list[str] = []
            reader = threading.Thread(target=lambda: texts.extend(c.text for c in waiting))
            reader.start()
            request = ops.StreamSampleRequest(operation_id=waiting.future.operation_id or "")
            metadata = (("authorization", f"Bearer {one.connection.api_key}"),)
            with grpc.insecure_channel(fleet.target) as channel:
                stub = operations_pb2_grpc.OperationsServiceStub(channel)
                with pytest.raises(grpc.RpcError) as refused:
                    next(stub.StreamSample(request, metadata=metadata))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not texts
            fleet.let_samples_go(worker)
            assert_right(runs[0], open_stream, begun, 0)
            reader.join(60)
            assert "".join(texts) == text_at(0)


def test_ctrl_c_on_the_command_line_stops_it(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient
):
    command = tensafe_command("sample", "--model", "any", "--prompt", "gate 1", "--stream")
    environment = {
        **isolated_environment(fleet.home),
        "TENSAFE_TARGET": fleet.target,
        "TENSAFE_API_KEY": client.connection.api_key or "",
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b" "
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
    assert process.returncode == 130
    assert [one.state for one in client.operations(limit=1)] == ["cancelled"]


def test_deleting_its_run_stops_it(client: ServiceClient, tc: TrainingClient):
    stream, _ = begin(tc)
    tc.delete()
    with pytest.raises(OperationCancelledError):
        list(stream)


def test_readers_that_read_nothing_hold_nobody_up(
    fleet: FaultyCluster, client: ServiceClient, tc: TrainingClient, worker: Process
):
    stream, text = begin(tc)
    request = ops.StreamSampleRequest(operation_id=stream.future.operation_id or "")
    metadata = list(client._session.metadata)
    with grpc.insecure_channel(fleet.target) as channel:
        stub = operations_pb2_grpc.OperationsServiceStub(channel)
        idle = [stub.StreamSample(request, metadata=metadata) for _ in range(50)]
        fleet.let_samples_go(worker)
        assert_right(tc, stream, text, 0)
        for call in idle:  # and yet each gets all of it
            answers = list(call)
            assert "".join(c.text for a in answers for c in a.chunks) == text_at(0)
            assert answers[-1].operation.state == ops.OPERATION_STATE_SUCCEEDED
