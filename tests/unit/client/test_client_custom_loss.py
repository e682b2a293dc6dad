"""A loss of the caller's own: what is sent, in which order, and what becomes of its failures."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_server import API_KEY, FakeCoordinator, Stored

from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import decode
from tensafe_client import (
    AsyncServiceClient,
    AuthenticationError,
    BatchError,
    ClientClosedError,
    ConfigError,
    Datum,
    InvalidArgumentError,
    MessageTooLargeError,
    OperationCancelledError,
    SequenceGapError,
    ServiceClient,
    TenSafeError,
    TrainingClient,
)
from tensafe_client.custom_loss import Logprobs

DATUMS = [
    Datum([5, 6, 7], [6, 7, 8], [0, 0.5, 2]),
    Datum([8, 9], [9, 10], advantages=1.0),
]
DATUMS[0].inputs["advantages"] = np.ones(3, np.float32)


def numpy_loss(logprobs: Logprobs) -> Any:
    """Σ (lp + 1)², by hand."""
    loss = sum(float(((lp + 1) ** 2).sum()) for lp in logprobs)
    return loss, [2 * (lp + 1) for lp in logprobs], {"datums": len(logprobs)}


def torch_loss(logprobs: Logprobs) -> Any:
    """The same by torch."""
    loss = sum(((lp + 1) ** 2).sum() for lp in logprobs.torch())
    return loss, {"datums": len(logprobs)}


def stored(server: FakeCoordinator, run_id: str) -> list[Stored]:
    """A run's operations in the order in which they came."""
    return [one for one in server.stored.values() if one.operation.run_id == run_id]


@pytest.mark.parametrize("loss", [numpy_loss, torch_loss])
def test_what_is_sent_and_what_comes_back(
    tc: TrainingClient, server: FakeCoordinator, loss: Callable[[Logprobs], Any]
) -> None:
    result = tc.forward_backward_custom(DATUMS, loss, deadline_s=60).result(timeout=20)
    expected = 16 + 25 + 36 + 49 + 64
    assert result.loss == result.metrics["loss"] == expected
    assert result.metrics["datums"] == 2
    assert (result.grad_norm, result.tokens_processed) == (1.5, 5)
    assert [lp.tolist() for lp in result.logprobs] == [[-5, -6, -7], [-8, -9]]

    forward, backward = (one.spec for one in stored(server, tc.run_id))
    assert (forward.seq, backward.seq) == (1, 2)
    assert forward.forward.dropout
    assert forward.time_to_live.seconds == backward.time_to_live.seconds == 60
    message = backward.forward_backward
    assert message.loss.name == "linear"
    # Spread over the 4 scored targets, the server's loss is the caller's.
    assert message.loss.options["value"] == expected / 4
    for batch in (forward.forward.batch.inline, message.batch.inline):
        named = {item.name: decode(item.tensor).tolist() for item in batch.loss_inputs}
        assert named["target_tokens"] == [6, 7, 8, 9, 10]
        assert named["weights"] == [0, 1, 1, 1, 1]
    assert named["gradients"] == [-8, -10, -12, -14, -16]
    assert set(named) == {"target_tokens", "weights", "gradients"}


def test_a_hugging_face_batch(tc: TrainingClient, batch: dict[str, list[list[int]]]) -> None:
    assert tc.forward_backward_custom(batch, numpy_loss).result(timeout=20).metrics["datums"] == 2


class Gate:
    """A loss function that waits until it may go on."""

    def __init__(self, loss: Callable[[Logprobs], Any] = numpy_loss) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._loss = loss

    def __call__(self, logprobs: Logprobs) -> Any:
        self.begun.set()
        assert self.go.wait(20)
        return self._loss(logprobs)


def test_what_is_submitted_meanwhile_keeps_its_place(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    first, second = Gate(), Gate()
    one = tc.forward_backward_custom(DATUMS, first)
    steps = [tc.optim_step()]
    two = tc.forward_backward_custom(DATUMS, second)
    steps.append(tc.optim_step())
    assert [one.seq, steps[0].seq, two.seq, steps[1].seq] == [2, 3, 5, 6]
    assert first.begun.wait(20)
    # Another run is not held up.
    other = client.create_training_client({"model_ref": "m"})
    assert other.optim_step().result(timeout=20).step == 1
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1]
    assert not second.begun.is_set()
    first.go.set()
    assert second.begun.wait(20)
    assert steps[0].result(timeout=20).step == 1
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1, 2, 3, 4]
    second.go.set()
    assert steps[1].result(timeout=20).step == 2
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1, 2, 3, 4, 5, 6]


class Own(BaseException):
    """An exception that `except Exception` does not catch."""


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), StopIteration(3), SystemExit(2), Own(), BatchError("b")]
)
def test_its_exceptions_are_the_callers_own(
    tc: TrainingClient, server: FakeCoordinator, error: BaseException
) -> None:
    def loss(logprobs: Logprobs) -> Any:
        raise error

    future = tc.forward_backward_custom(DATUMS, loss)
    step = tc.optim_step()
    assert future.exception(timeout=20) is error
    with pytest.raises(type(error)):
        future.result(timeout=20)
    step.result(timeout=20)
    backward = stored(server, tc.run_id)[1].spec
    # Without a batch the server refuses it, and it poisons its window.
    assert backward.HasField("forward_backward")
    assert not backward.forward_backward.HasField("batch")
    assert tc.forward_backward_custom(DATUMS, numpy_loss).result(timeout=20).loss == 190


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        (lambda lp: 1.0, "must return"),
        (lambda lp: None, "must return"),
        (lambda lp: (1.0, [lp[0]]), "1 gradients for 2 datums"),
        (lambda lp: (1.0, [lp[0], lp[0]]), r"datum 1 with shape \[3\]"),
        (lambda lp: (1.0, [lp[0], np.array(["a", "b"])]), "datum 1"),
        (lambda lp: (1.0, [lp[0], lp[1] * np.nan]), "datum 1 that is NaN"),
        (lambda lp: (1.0, [lp[0], lp[1].astype(float) * 1e300]), "datum 1 that is NaN or infinite"),
        (lambda lp: (np.inf, list(lp)), "loss of inf"),
        (lambda lp: ("1", list(lp)), "must be a number"),
        (lambda lp: (1.0, list(lp), 5), "no dict"),
        (lambda lp: (1.0, list(lp), {"x": "y"}), "metric x"),
        (lambda lp: (1.0, list(lp), {"loss": 2.0}), "metric named 'loss'"),
        (lambda lp: (1.0, list(lp), {"grad_norm": 2.0}), "metric named 'grad_norm'"),
        (lambda lp: lp.torch()[0], "one element"),
        (lambda lp: lp.torch() and 1.0, "one element"),
        (lambda lp: lp.torch()[0].detach().sum(), "depends on no log-probability"),
        (lambda lp: (lp.torch()[0] / 0).sum() * float("nan"), "loss of nan"),
    ],
)
def test_what_it_must_return(
    tc: TrainingClient, returns: Callable[[Logprobs], Any], says: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        tc.forward_backward_custom(DATUMS, returns).result(timeout=20)
    assert caught.value.violations


def test_a_loss_may_leave_datums_out(tc: TrainingClient, server: FakeCoordinator) -> None:
    tc.forward_backward_custom(DATUMS, lambda lp: lp.torch()[1].sum()).result(timeout=20)
    batch = stored(server, tc.run_id)[1].spec.forward_backward.batch.inline
    assert decode(batch.loss_inputs[2].tensor).tolist() == [0, 0, 0, 1, 1]


def test_soft_targets_are_scored_one_by_one(tc: TrainingClient, server: FakeCoordinator) -> None:
    soft = [Datum([1, 2], [[3, 4], [5, 6]], [[0.5, 0], [1, 1]])]
    # The fake server's log-probabilities are one for each token, so the function is refused.
    assert tc.forward_backward_custom(soft, lambda lp: (1.0, [])).exception(timeout=20)
    batch = stored(server, tc.run_id)[0].spec.forward.batch.inline
    assert decode(batch.loss_inputs[0].tensor).tolist() == [[3, 4], [5, 6]]
    assert decode(batch.loss_inputs[1].tensor).tolist() == [[1, 0], [1, 1]]


def test_torch_is_asked_for_only_by_who_wants_it(
    tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what makes `import torch` fail
    assert tc.forward_backward_custom(DATUMS, numpy_loss).result(timeout=20).loss == 190
    with pytest.raises(ConfigError, match="not installed") as caught:
        tc.forward_backward_custom(DATUMS, torch_loss).result(timeout=20)
    assert "NumPy" in str(caught.value)


def test_a_batch_that_is_refused_poisons_its_window(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    huge = [Datum(np.zeros(1_100_000, int), np.zeros(1_100_000, int))]
    for batch, error in (([], BatchError), (huge, MessageTooLargeError)):
        with pytest.raises(error):
            tc.forward_backward_custom(batch, numpy_loss)
    with pytest.raises(ConfigError, match="fn must be a function"):
        tc.forward_backward_custom(DATUMS, 5)  # type: ignore[arg-type]
    tc.optim_step().result(timeout=20)
    specs = [one.spec for one in stored(server, tc.run_id)]
    kinds = [spec.WhichOneof("operation") for spec in specs]
    assert kinds == ["forward_backward"] * 3 + ["optim_step"]
    assert not any(spec.forward_backward.HasField("batch") for spec in specs)


def test_a_forward_pass_that_fails_is_its_failure(
    tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.fail[1] = TenSafeFault("OUT_OF_MEMORY", "too little memory")
    called = threading.Event()
    future = tc.forward_backward_custom(DATUMS, lambda _: called.set())
    with pytest.raises(TenSafeError, match="too little memory"):
        future.result(timeout=20)
    tc.optim_step().result(timeout=20)
    assert not called.is_set()
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1, 2, 3]


def test_a_cancel_while_it_is_made(tc: TrainingClient, server: FakeCoordinator) -> None:
    gate = Gate()
    future = tc.forward_backward_custom(DATUMS, gate)
    step = tc.optim_step()
    assert gate.begun.wait(20)
    assert future.cancel()
    assert future.cancelled()
    # What comes after it need not wait for the function.
    assert step.result(timeout=20).step == 1
    with pytest.raises(OperationCancelledError):
        future.result(timeout=20)
    gate.go.set()
    assert not stored(server, tc.run_id)[1].spec.forward_backward.HasField("batch")
    done = tc.forward_backward_custom(DATUMS, numpy_loss)
    done.result(timeout=20)
    assert not done.cancel()


def test_closing_waits_for_the_function(client: ServiceClient, server: FakeCoordinator) -> None:
    tc = client.create_training_client({"model_ref": "m"})
    gate = Gate()
    future = tc.forward_backward_custom(DATUMS, gate)
    step = tc.optim_step()
    assert gate.begun.wait(20)
    closing = threading.Thread(target=client.close)
    closing.start()
    gate.go.set()
    closing.join(20)
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1, 2, 3]
    for one in (future, step):
        # The operation has ended, or nobody is left to hear of it.
        assert one.done()


def test_a_client_that_closes_before_the_function_ends(server: FakeCoordinator) -> None:
    client = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY, timeout_s=0.3)
    tc = client.create_training_client({"model_ref": "m"})
    gate = Gate()
    future = tc.forward_backward_custom(DATUMS, gate)
    step = tc.optim_step()
    assert gate.begun.wait(20)
    client.close()
    gate.go.set()
    for one in (future, step):
        with pytest.raises(ClientClosedError):
            one.result(timeout=20)
    assert [s.operation.seq for s in stored(server, tc.run_id)] == [1]


def test_a_run_whose_forward_pass_never_arrived(
    tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc.optim_step().result(timeout=20)
    monkeypatch.setattr("fake_server.API_KEY", "ts_other")  # the next call is refused as a whole
    called = threading.Event()
    future = tc.forward_backward_custom(DATUMS, lambda _: called.set())
    step = tc.optim_step()
    for one in (future, step):
        assert isinstance(one.exception(timeout=20), SequenceGapError | AuthenticationError)
    assert not called.is_set()


def test_the_asyncio_twin(server: FakeCoordinator) -> None:
    async def main() -> None:
        async with AsyncServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
            tc = await client.create_training_client({"model_ref": "m"})
            future = tc.forward_backward_custom(DATUMS, numpy_loss)
            step = tc.optim_step()
            assert (await future).loss == 190
            assert (await step).step == 1
            with pytest.raises(ZeroDivisionError):
                await tc.forward_backward_custom(DATUMS, lambda lp: 1 / 0)

    asyncio.run(main())
