"""What a private run's owner is told: what was noised, and what is public.

The worker tells no more than that; what it should not have told is held back here too.
"""

from __future__ import annotations

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.privacy_pb2 import DpMetrics
from tensafe.v1.types_pb2 import REDUCTION_LAST, Metric
from tensafe.wire.status import ErrorDetail, TenSafeFault
from tensafe_server.privacy.budgets import Cost
from tensafe_server.privacy.runs import PrivateRun

_NOISED = frozenset({"grad_norm", "learning_rate"})
_OF_THE_CLIENT = frozenset({"tokens", "tokens_per_second", "compute_ms"})
# Failures that do not depend on what was drawn.
_PUBLIC_REASONS = frozenset({"MAX_STEPS_REACHED", "OPERATION_CANCELLED", "DEADLINE_EXCEEDED"})


def release_result(private: PrivateRun, result: ops.OperationResult) -> None:
    """Takes out of an operation's result what its run does not tell."""
    if private.raw_metrics or not result.HasField("forward_backward"):
        return
    gradient = result.forward_backward
    kept = [metric for metric in gradient.metrics if metric.name == "tokens"]
    del gradient.metrics[:]
    gradient.metrics.extend(kept)
    del gradient.outputs[:]


def step_metrics(private: PrivateRun, given: list[Metric], told: DpMetrics) -> list[Metric]:
    """The metrics of an applied step, ε among them."""
    names = _NOISED if private.server_poisson else _NOISED | _OF_THE_CLIENT
    kept = [one for one in given if private.raw_metrics or one.name in names]
    kept += [
        Metric(name=name, value=getattr(told, name), reduction=REDUCTION_LAST)
        for name in ("total_epsilon", "noised_loss")
        if told.HasField(name)
    ]
    return kept


def dp_metrics(private: PrivateRun, cost: Cost, of_worker: DpMetrics) -> DpMetrics:
    """What a step has cost and may tell."""
    told = DpMetrics(
        noise_applied=of_worker.noise_applied and private.noise_multiplier > 0,
        delta=private.terms.delta,
        sampling_verified=cost.sampling_verified,
    )
    if cost.total < float("inf"):
        told.epsilon_spent = max(0.0, cost.total - cost.before)
        told.total_epsilon = cost.total
    if cost.if_poisson is not None and cost.if_poisson < float("inf"):
        told.epsilon_if_poisson = cost.if_poisson
    if cost.steps_left is not None:
        told.steps_left = cost.steps_left
    if private.raw_metrics and of_worker.HasField("num_clipped"):
        told.num_clipped = of_worker.num_clipped
    if of_worker.HasField("noised_loss"):
        told.noised_loss = of_worker.noised_loss
    return told


def may_tell_of_draw(private: PrivateRun, error: ErrorDetail) -> bool:
    """Whether a failed step tells, by failing, who was drawn: then it has released that."""
    return private.server_poisson and error.reason not in _PUBLIC_REASONS


def release_error(private: PrivateRun, error: ErrorDetail, operation_id: str) -> ErrorDetail:
    """Why a step failed; where the server drew its batch, nothing that may depend on that."""
    if not may_tell_of_draw(private, error):
        return error
    return TenSafeFault(
        "INTERNAL",
        f"private step {operation_id} failed; why may depend on what was drawn, and is in the "
        "server's log only. Its charge counts as spent; tell the operator",
        operation_id=operation_id,
    ).detail
