"""Comparing what a replay gave with what the log has.

Bit by bit in deterministic runs, where the worker is of the kind that gave the logged result, and
those of all replayed operations before it. Else within these bounds, which are wide enough for
other kernels and bfloat16, and far too narrow for another batch, seed or step:

    loss, grad_norm, learning_rate   |Δ| ≤ 0.02·|logged| + 0.001
    log-probabilities                |Δ| ≤ 0.02·|logged| + 0.05
    counts, steps, kinds             equal

A loss with metrics of its own may be a small difference of large terms, and a metric may jump at a
threshold: both follow from the log-probabilities, which are compared, and are then left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.types_pb2 import Metric, NamedTensor
from tensafe.wire.status import from_status
from tensafe.wire.tensors import decode

_RELATIVE = 0.02
_METRIC = 1e-3
_LOGPROB = 0.05
_COUNTS = frozenset({"tokens", "scored_tokens"})
_COMMON = _COUNTS | {"loss", "grad_norm"}


def fingerprint_digest(fingerprint: Mapping[str, str]) -> str:
    """16 hexadecimal digits: equal for workers whose results are equal."""
    return hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]


def error_difference(logged: Status | None, replayed: Status | None) -> str | None:
    """What differs if one of them failed, or both in another way; None if nothing does."""
    if logged is None and replayed is None:
        return None
    if logged is None and replayed is not None:
        return f"it succeeded, and the replay failed: {replayed.message}"
    if logged is not None and replayed is None:
        return f"it failed, and the replay succeeded: {logged.message}"
    assert logged is not None
    assert replayed is not None
    before, now = from_status(logged).reason, from_status(replayed).reason
    return None if before == now else f"it failed with {before}, and the replay with {now}"


def result_difference(
    logged: ops.OperationResult, replayed: ops.OperationResult, *, exact: bool, pruned: bool
) -> str | None:
    """What differs between two results, for people; None if nothing does.

    Args:
        exact: every bit must agree.
        pruned: the logged result has lost its per-token outputs; they are not compared.
    """
    kind = logged.WhichOneof("result")
    if kind != replayed.WhichOneof("result"):
        return f"the result is of kind {replayed.WhichOneof('result')} instead of {kind}"
    if kind == "forward_backward":
        before, now = logged.forward_backward, replayed.forward_backward
        difference = _metrics(before.metrics, now.metrics, exact)
        if difference is None and not pruned:
            difference = _outputs(before.outputs, now.outputs, exact)
        return difference
    if kind == "optim_step":
        one, two = logged.optim_step, replayed.optim_step
        if (one.step, one.applied) != (two.step, two.applied):
            return f"step {two.step} (applied: {two.applied}) instead of {one.step} ({one.applied})"
        if one.HasField("grad_norm") != two.HasField("grad_norm"):
            return "grad_norm is given in one of them only"
        return _number("grad_norm", one.grad_norm, two.grad_norm, exact) or _number(
            "learning_rate", one.learning_rate, two.learning_rate, exact
        )
    if logged.SerializeToString(deterministic=True) != replayed.SerializeToString(
        deterministic=True
    ):
        return f"another {kind} result"
    return None


def _metrics(logged: Sequence[Metric], replayed: Sequence[Metric], exact: bool) -> str | None:
    now = {metric.name: metric for metric in replayed}
    if {metric.name for metric in logged} != set(now):
        return f"metrics {sorted(now)} instead of {sorted(metric.name for metric in logged)}"
    derived = {metric.name for metric in logged} - _COMMON
    left_alone = set() if exact or not derived else {*derived, "loss"}
    for metric in logged:
        other = now[metric.name]
        bits = exact or metric.name in _COUNTS
        if metric.name not in left_alone and (
            difference := _number(metric.name, metric.value, other.value, bits)
        ):
            return difference
        if metric.weight != other.weight:
            return f"weight of {metric.name} {other.weight!r} instead of {metric.weight!r}"
    return None


def _number(name: str, logged: float, replayed: float, exact: bool) -> str | None:
    same = logged == replayed
    if not same and not exact:
        same = abs(replayed - logged) <= _RELATIVE * abs(logged) + _METRIC
    return None if same else f"{name} {replayed!r} instead of {logged!r}"


def _outputs(
    logged: Sequence[NamedTensor], replayed: Sequence[NamedTensor], exact: bool
) -> str | None:
    now = {item.name: item for item in replayed}
    if {item.name for item in logged} != set(now):
        return f"outputs {sorted(now)} instead of {sorted(item.name for item in logged)}"
    for item in logged:
        before, after = decode(item.tensor), decode(now[item.name].tensor)
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"{item.name} of another shape or type"
        if before.tobytes() == after.tobytes() or not (exact or item.name == "logprobs"):
            continue
        gap = np.abs(after.astype(np.float64) - before.astype(np.float64))
        if not exact and bool(np.all(gap <= _RELATIVE * np.abs(before) + _LOGPROB)):
            continue
        worst = int(np.argmax(gap))
        return (
            f"{item.name} differs in {int(np.count_nonzero(gap))} of {gap.size} numbers, most at "
            f"{worst}: {after.flat[worst]!r} instead of {before.flat[worst]!r}"
        )
    return None
