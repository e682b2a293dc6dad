"""Replayed against logged: bit by bit, or within the documented bounds."""

from __future__ import annotations

import numpy as np
import pytest
from unit.server.small_store import operation

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.types_pb2 import Metric, NamedTensor
from tensafe.wire.status import TenSafeFault, to_status
from tensafe.wire.tensors import encode
from tensafe_server.fleet.replay import Lineage
from tensafe_server.operations.comparison import (
    error_difference,
    fingerprint_digest,
    result_difference,
)


def passed(loss: float = 2.0, logprob: float = -1.0, tokens: int = 5) -> ops.OperationResult:
    result = ops.OperationResult()
    result.forward_backward.metrics.extend(
        [Metric(name="loss", value=loss, weight=5), Metric(name="tokens", value=tokens)]
    )
    values = np.full(5, -1.0, np.float32)
    values[3] = logprob
    result.forward_backward.outputs.append(NamedTensor(name="logprobs", tensor=encode(values)))
    return result


def stepped(step: int = 3, norm: float | None = 1.0) -> ops.OperationResult:
    step_result = ops.OptimStepResult(step=step, applied=True, learning_rate=0.1)
    if norm is not None:
        step_result.grad_norm = norm
    return ops.OperationResult(optim_step=step_result)


def clipped(fraction: float, loss: float = 0.001, ratio: float = 1.0) -> ops.OperationResult:
    """Of a loss with a metric and an output of its own."""
    result = passed(loss)
    result.forward_backward.metrics.append(Metric(name="clip_fraction", value=fraction))
    values = np.full(5, ratio, np.float32)
    result.forward_backward.outputs.append(NamedTensor(name="ratio", tensor=encode(values)))
    return result


ULP = float(np.nextafter(np.float32(-1.0), np.float32(0.0)))


@pytest.mark.parametrize(
    ("logged", "replayed", "exact", "tolerant"),
    [
        (passed(), passed(), None, None),
        (passed(), passed(loss=2.0000001), "loss 2.0000001 instead of 2.0", None),
        (passed(), passed(logprob=ULP), "logprobs differs in 1 of 5 numbers, most at 3", None),
        (passed(), passed(loss=2.1), "loss 2.1", "loss 2.1"),
        (passed(), passed(logprob=-1.2), "logprobs", "logprobs"),
        (passed(), passed(logprob=float("nan")), "logprobs", "logprobs"),
        (passed(), passed(tokens=6), "tokens 6.0 instead of 5.0", "tokens 6.0 instead of 5.0"),
        (clipped(0.2), clipped(0.3), "clip_fraction", None),
        (clipped(0.2), clipped(0.2, loss=-0.01), "loss", None),
        (clipped(0.2), clipped(0.2, ratio=1.5), "ratio", None),
        (clipped(0.2), passed(), "metrics", "metrics"),
        (stepped(), stepped(), None, None),
        (stepped(), stepped(norm=1.001), "grad_norm", None),
        (stepped(), stepped(norm=1.5), "grad_norm", "grad_norm"),
        (stepped(), stepped(norm=None), "one of them only", "one of them only"),
        (stepped(), stepped(step=4), "step 4", "step 4"),
        (stepped(), passed(), "of kind forward_backward", "of kind forward_backward"),
    ],
)
def test_results(logged, replayed, exact, tolerant):
    for is_exact, expected in ((True, exact), (False, tolerant)):
        found = result_difference(logged, replayed, exact=is_exact, pruned=False)
        assert (found is None) == (expected is None), found
        assert expected is None or expected in (found or "")


def test_what_was_pruned_of_the_log_is_not_compared():
    logged = passed()
    del logged.forward_backward.outputs[:]
    assert result_difference(logged, passed(), exact=True, pruned=True) is None
    assert result_difference(logged, passed(loss=3.0), exact=True, pruned=True) is not None


def test_errors():
    empty = to_status(TenSafeFault("EMPTY_WINDOW", "a").detail)
    poisoned = to_status(TenSafeFault("WINDOW_POISONED", "b").detail)
    assert error_difference(None, None) is None
    assert error_difference(empty, empty) is None
    assert "EMPTY_WINDOW, and the replay with WINDOW" in (error_difference(empty, poisoned) or "")
    assert "the replay failed" in (error_difference(None, empty) or "")
    assert "the replay succeeded" in (error_difference(empty, None) or "")


def test_bits_are_asked_for_until_another_kind_of_worker_comes_in():
    cpu = {"backend": "torch", "device": "cpu", "threads": "1"}
    own, other = fingerprint_digest(cpu), fingerprint_digest(cpu | {"threads": "2"})
    assert own != other
    lineage = Lineage(own, exact=True)
    found = [lineage.pass_by(operation(1, fingerprint=one)) for one in (own, own, other, own)]
    assert found == [True, True, False, False]
    assert not Lineage(own, exact=False).pass_by(operation(1, fingerprint=own))
