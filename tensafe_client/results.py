"""What operations and calls return: frozen dataclasses, made from the wire's messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

from google.protobuf import struct_pb2, timestamp_pb2

from tensafe.v1 import metrics_pb2, operations_pb2, types_pb2
from tensafe.wire.tensors import Array, decode
from tensafe_client.dp_metrics import DPMetrics
from tensafe_client.samples import SampleResult


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """Result of `forward`.

    Attributes:
        loss: the mean that the reduction says, or the sum under reduction="sum".
        tokens_processed: tokens that the model read.
        metrics: every metric of the call by name, those that the loss defines among them.
        outputs: outputs by name, one array for each datum: [T_b], one number for each token, or
            [1] where the loss defines one for each datum. A handle rebuilt with `client.future`
            does not know the batch: there each per-token list has one array for all datums.
        reductions: how a metric of several calls is made of theirs, by its name: "sum", "mean"
            (weighted by `scored_tokens`), "min", "max" or "last".
    """

    loss: float
    tokens_processed: int
    metrics: Mapping[str, float] = field(repr=False)
    outputs: Mapping[str, list[Array]] = field(repr=False)
    reductions: Mapping[str, str] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def logprobs(self) -> list[Array]:
        """float32 [T_b] for each datum b: log-probability of each target token, 0 if not scored;
        [T_b, K] for soft targets."""
        return self.outputs.get("logprobs", [])


@dataclass(frozen=True, eq=False)
class ForwardBackwardResult(ForwardResult):
    """Result of `forward_backward`.

    Attributes:
        grad_norm: L2 norm of this call's own normalised gradient.
    """

    grad_norm: float


@dataclass(frozen=True)
class OptimStepResult:
    """Result of `optim_step`.

    Attributes:
        step: applied updates of the run.
        applied: whether this call closed the accumulation window and changed the weights.
        learning_rate: step size used, or that an update now would use.
        grad_norm: L2 norm of the applied gradient before clipping, in a private run of the noised
            one; None if not applied.
        dp: of a private run's applied step what it cost; None else.
    """

    step: int
    applied: bool
    learning_rate: float
    grad_norm: float | None
    dp: DPMetrics | None = None


@dataclass(frozen=True)
class SaveStateResult:
    """Result of `save_state`.

    Attributes:
        artifact_id: the saved artifact.
        step: applied updates of the saved weights.
        size_bytes: sum of its files' sizes.
        sha256: over its files in name order, each as `<sha256>  <name>` and a newline.
        has_optimizer: whether it holds what continuing needs.
        metadata: the caller's own JSON object.
        created_at: when it was saved.
        expires_at: when its time to live is over; None if it has none.
    """

    artifact_id: str
    step: int
    size_bytes: int
    sha256: str
    has_optimizer: bool
    metadata: Mapping[str, Any]
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True)
class LoadStateResult:
    """Result of `load_state`.

    Attributes:
        artifact_id: the artifact.
        step: applied updates of the run from now on.
        optimizer_restored: whether optimizer, counters and window were restored too.
    """

    artifact_id: str
    step: int
    optimizer_restored: bool

    @property
    def loaded_artifact_id(self) -> str:
        """The artifact."""
        return self.artifact_id


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one applied update.

    Attributes:
        step: applied updates, this one included.
        loss: mean over the accumulation window's weights.
        grad_norm: L2 norm of the applied gradient before clipping.
        learning_rate: step size used.
        tokens: tokens read in the window.
        tokens_per_second: of compute time.
        queue_ms: sum over the window's operations.
        compute_ms: sum over the window's operations.
        time: when it was applied.
        cursor: pass it as `since` to go on after this step.
        skipped: updates right before this one that are left out, since the loop over `metrics`
            had fallen far behind; the step before it has the cursor to read them from.
        values: every metric by name; a field above whose metric the server did not send is NaN
            (`tokens`: 0).
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    queue_ms: float
    compute_ms: float
    time: datetime
    cursor: int
    skipped: int
    run_id: str = field(repr=False)
    values: Mapping[str, float] = field(repr=False)

    @classmethod
    def from_proto(cls, message: metrics_pb2.StepMetrics) -> StepMetrics:
        """Unpacks one step."""
        values = {metric.name: metric.value for metric in message.values}
        nan = float("nan")
        return cls(
            step=message.step,
            loss=values.get("loss", nan),
            grad_norm=values.get("grad_norm", nan),
            learning_rate=values.get("learning_rate", nan),
            tokens=int(values.get("tokens", 0)),
            tokens_per_second=values.get("tokens_per_second", nan),
            queue_ms=values.get("queue_ms", nan),
            compute_ms=values.get("compute_ms", nan),
            time=to_datetime(message.time),
            cursor=message.cursor,
            skipped=message.skipped,
            run_id=message.run_id,
            values=values,
        )


def to_datetime(stamp: timestamp_pb2.Timestamp) -> datetime:
    """Converts to an aware datetime, UTC."""
    return stamp.ToDatetime(tzinfo=UTC)


def to_dict(message: struct_pb2.Struct) -> dict[str, Any]:
    """Converts a JSON object; whole numbers come back as int.

    What JSON lacks and another client may have stored all the same comes back as the string "NaN",
    "Infinity" or "-Infinity".
    """
    return {key: _plain(item) for key, item in message.fields.items()}


@lru_cache(256)
def enum_name(enum: Any, number: int) -> str:
    """Returns `forward_backward` for OPERATION_KIND_FORWARD_BACKWARD, and so on.

    A number that a newer server may send is named by itself.
    """
    value = enum.DESCRIPTOR.values_by_number.get(number)
    if value is None:
        return f"unknown_{number}"
    # Every value starts with its type's name: RunStatus, RUN_STATUS_ACTIVE.
    words = sum(letter.isupper() for letter in enum.DESCRIPTOR.name)
    return str(value.name).split("_", words)[-1].lower()


def result_of(operation: operations_pb2.Operation, offsets: Array | None) -> Any:
    """Unpacks the result of a SUCCEEDED operation.

    Args:
        operation: the finished operation.
        offsets: int64 [B + 1] of the batch that was sent; None if this process did not send it.
    """
    name = operation.result.WhichOneof("result")
    if name is None:
        raise ValueError(f"operation {operation.id} succeeded without a result")
    if name in ("forward", "forward_backward"):
        return _CONVERTERS_BATCH[name](getattr(operation.result, name), offsets)
    return _CONVERTERS[name](getattr(operation.result, name))


def _forward(message: operations_pb2.ForwardResult, offsets: Array | None) -> ForwardResult:
    metrics = _metrics(message)
    return ForwardResult(
        loss=metrics.get("loss", float("nan")),
        tokens_processed=int(metrics.get("tokens", 0)),
        metrics=metrics,
        outputs=_outputs(message, offsets),
        reductions=_reductions(message),
    )


def _forward_backward(
    message: operations_pb2.ForwardBackwardResult, offsets: Array | None
) -> ForwardBackwardResult:
    metrics = _metrics(message)
    return ForwardBackwardResult(
        loss=metrics.get("loss", float("nan")),
        tokens_processed=int(metrics.get("tokens", 0)),
        metrics=metrics,
        outputs=_outputs(message, offsets),
        reductions=_reductions(message),
        grad_norm=metrics.get("grad_norm", float("nan")),
    )


def _optim_step(message: operations_pb2.OptimStepResult) -> OptimStepResult:
    return OptimStepResult(
        step=message.step,
        applied=message.applied,
        learning_rate=message.learning_rate,
        grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
        dp=DPMetrics.from_proto(message.dp) if message.HasField("dp") else None,
    )


def _save_state(message: operations_pb2.SaveStateResult) -> SaveStateResult:
    artifact = message.artifact
    return SaveStateResult(
        artifact_id=artifact.id,
        step=artifact.step,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        has_optimizer=artifact.has_optimizer,
        metadata=to_dict(artifact.metadata),
        created_at=to_datetime(artifact.created_at),
        expires_at=to_datetime(artifact.expires_at) if artifact.HasField("expires_at") else None,
    )


def _load_state(message: operations_pb2.LoadStateResult) -> LoadStateResult:
    return LoadStateResult(message.artifact_id, message.step, message.optimizer_restored)


_CONVERTERS_BATCH: dict[str, Callable[[Any, Array | None], ForwardResult]] = {
    "forward": _forward,
    "forward_backward": _forward_backward,
}
_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "optim_step": _optim_step,
    "sample": SampleResult.from_proto,
    "save_state": _save_state,
    "load_state": _load_state,
}


def _metrics(
    message: operations_pb2.ForwardResult | operations_pb2.ForwardBackwardResult,
) -> dict[str, float]:
    return {metric.name: metric.value for metric in message.metrics}


def _reductions(
    message: operations_pb2.ForwardResult | operations_pb2.ForwardBackwardResult,
) -> dict[str, str]:
    return {
        metric.name: enum_name(types_pb2.Reduction, metric.reduction) for metric in message.metrics
    }


def _outputs(
    message: operations_pb2.ForwardResult | operations_pb2.ForwardBackwardResult,
    offsets: Array | None,
) -> dict[str, list[Array]]:
    return {item.name: _pieces(item, offsets) for item in message.outputs}


def _pieces(item: types_pb2.NamedTensor, offsets: Array | None) -> list[Array]:
    whole = decode(item.tensor)
    if item.HasField("offsets"):
        offsets = decode(item.offsets)
    if offsets is None:
        return [whole]
    bounds = offsets.tolist()
    return [whole[a:b] for a, b in pairwise(bounds)]


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return to_dict(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    if kind == "number_value":
        return _plain_number(value.number_value)
    return None if kind in (None, "null_value") else getattr(value, kind)


def _plain_number(number: float) -> float | str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return int(number) if number.is_integer() else number
