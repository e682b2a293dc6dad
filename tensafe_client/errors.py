"""What can go wrong, one class for each cause.

Every exception of the SDK is a `TenSafeError`. Those that the server sent carry its `reason` (a
name of `tensafe.v1.ErrorReason`), its gRPC code and its metadata; the text ends with the remedy.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Self

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from tensafe.wire.status import ErrorDetail
from tensafe.wire.status import from_status as detail_of_status


class TenSafeError(Exception):
    """Base of all errors of the SDK.

    Attributes:
        message: what happened and to what.
        reason: name of an `ErrorReason` without prefix. What this side refuses has the reason and
            the code that the server would give; other errors of this side have none.
        code: gRPC code name (`NOT_FOUND`).
        metadata: variables of the message by name (`run_id`, `field`, …).
        violations: (field, description) of each broken rule.
        remedy: what to do; empty where the message says it already.
        retry_delay_s: when a retry may help, seconds; None if it will not.
    """

    remedy: str = ""
    _reason: str = ""
    _code: str = ""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        remedy: str | None = None,
        retry_delay_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self._reason
        self.code = code or self._code
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[tuple[str, str], ...] = tuple(violations)
        self.retry_delay_s = retry_delay_s
        if remedy is not None:
            self.remedy = remedy

    @property
    def resource(self) -> str:
        """Id or name of what the error is about; empty if unknown."""
        for key in ("operation_id", "artifact_id", "run_id", "model_ref", "tenant", "key_id"):
            if key in self.metadata:
                return self.metadata[key]
        return ""

    def __str__(self) -> str:
        lines = [f"[{self.reason}] {self.message}" if self.reason else self.message]
        lines += [f"  {name}: {text}" for name, text in self.violations if text not in self.message]
        if self.remedy:
            lines.append(f"  Remedy: {self.remedy}")
        return "\n".join(lines)


class ConnectionFailedError(TenSafeError, ConnectionError):
    """No coordinator answers at the target."""


class ClientClosedError(TenSafeError):
    """The client was closed, or belongs to another process."""


class AuthenticationError(TenSafeError):
    """The API key is missing, unknown or revoked."""

    remedy = "pass api_key=, set TENSAFE_API_KEY, or put the key into the profile"


class PermissionDeniedError(TenSafeError):
    """The key is of another kind than the call needs (tenant, admin, worker)."""

    remedy = "use a key of the kind that the call needs"


class NotFoundError(TenSafeError):
    """Something does not exist, or belongs to another tenant."""


class RunNotFoundError(NotFoundError):
    """No such run."""

    remedy = "client.runs() lists the runs of this key's tenant"


class OperationNotFoundError(NotFoundError):
    """No such operation."""

    remedy = "client.operations() lists the operations of this key's tenant"


class OperationLostError(TenSafeError):
    """The server had accepted the operation, and its disk has lost it since."""

    remedy = (
        "attach to its run again, client.training_client(run_id), and go on from the step that it "
        "has; what belongs to no run can be sent again as it was"
    )


class ArtifactNotFoundError(NotFoundError):
    """No such artifact."""

    remedy = "client.artifacts() lists the artifacts of this key's tenant"


class ArtifactExpiredError(ArtifactNotFoundError):
    """The artifact was deleted, or its time to live is over."""


class ModelNotFoundError(NotFoundError):
    """No model is registered under this name."""

    remedy = "client.models() lists the models that the operator has registered"


class InvalidArgumentError(TenSafeError, ValueError):
    """An argument breaks a rule; `violations` names the fields."""

    _reason = "INVALID_ARGUMENT"
    _code = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, field: str, rule: str, *, message: str = "", remedy: str | None = None) -> Self:
        """Names the argument or field, and the rule that it breaks."""
        return cls(message or f"{field} {rule}", violations=[(field, rule)], remedy=remedy)


class ConfigError(InvalidArgumentError):
    """A configuration has an unknown field, or a value of the wrong type."""


class BatchError(InvalidArgumentError):
    """A batch is ragged, empty or malformed, or nothing in it is scored."""

    _reason = "INVALID_BATCH"


class UnsupportedOptionError(InvalidArgumentError):
    """The chosen optimizer, loss or model lacks this option."""


class UnknownTargetModuleError(InvalidArgumentError):
    """The model lacks a LoRA target module."""


class MessageTooLargeError(InvalidArgumentError):
    """A request is larger than the server takes."""


class NonFiniteLossError(InvalidArgumentError):
    """The loss is not finite; the call added no gradient."""


class OutOfRangeError(TenSafeError, ValueError):
    """A value lies outside what exists: a token id, a cursor, an offset."""


class TokenOutOfRangeError(OutOfRangeError):
    """A token id is outside the model's vocabulary."""


class ContextExceededError(OutOfRangeError):
    """A sequence is longer than the model's context."""


class PreconditionError(TenSafeError):
    """The state of the run, artifact or model does not allow this."""


class RunDeletedError(PreconditionError):
    """The run was deleted."""


class SequenceGapError(PreconditionError):
    """An earlier operation of the run never arrived."""

    remedy = "attach to the run again: client.training_client(run_id)"


class MaxStepsReachedError(PreconditionError):
    """The run's `max_steps` updates were applied."""


class WindowPoisonedError(PreconditionError):
    """A forward_backward of this accumulation window failed; the accumulator was cleared."""

    remedy = "the next window starts clean: repeat its forward_backward calls"


class EmptyWindowError(PreconditionError):
    """optim_step came without a forward_backward before it."""


class MixedReductionError(PreconditionError):
    """A call used another reduction than the first of its accumulation window."""


class NonFiniteGradientError(PreconditionError):
    """The gradient is not finite; nothing was applied and the accumulator was cleared."""


class ArtifactMismatchError(PreconditionError):
    """The artifact does not fit the run."""


class ArtifactInUseError(PreconditionError):
    """A run's recovery or an unfinished operation still needs the artifact."""


class NoChatTemplateError(PreconditionError):
    """The model has no chat template, or no tokenizer."""


class VersionNotSavedError(PreconditionError):
    """No weights of the run were saved at that step."""


class DPBudgetExceededError(PreconditionError):
    """A private step would pass the target ε of its dataset's ledger; nothing was done."""

    @property
    def current_epsilon(self) -> float | None:
        """ε that the ledger has; None if the server did not say."""
        value = self.metadata.get("current_epsilon")
        return None if value is None else float(value)

    @property
    def max_epsilon(self) -> float | None:
        """The run's `target_epsilon`; None if the server did not say."""
        value = self.metadata.get("max_epsilon")
        return None if value is None else float(value)


class DPStepLostError(TenSafeError):
    """The worker was lost during a private step: it is charged, and made no update."""

    remedy = "the next window starts clean: repeat its forward_backward calls"


class DatasetNotFoundError(NotFoundError):
    """No such dataset."""

    remedy = "client.datasets() lists the datasets of this key's tenant"


class DatasetInUseError(PreconditionError):
    """A run draws from the dataset."""


class InvalidDatasetError(InvalidArgumentError):
    """A dataset's file is malformed."""


class ConflictError(TenSafeError):
    """Something like this exists already."""


class SequenceConflictError(ConflictError):
    """The seq was used before with another content: another process drives this run."""

    remedy = "let one process drive a run; attach again with client.training_client(run_id)"


class NameTakenError(ConflictError):
    """The name is taken."""


class ResourceExhaustedError(TenSafeError):
    """A quota, a queue or a device is full."""


class QueueFullError(ResourceExhaustedError):
    """A queue is full; `retry_delay_s` says when to try again."""


class StorageFullError(ResourceExhaustedError):
    """The server's disk is full; nothing of the call was stored."""


class OutOfMemoryError(ResourceExhaustedError):
    """The device has too little memory for this operation."""

    remedy = "send shorter sequences or smaller batches"


class OperationCancelledError(TenSafeError, concurrent.futures.CancelledError):
    """The operation was cancelled before it ran."""


class DeadlineExceededError(TenSafeError, TimeoutError):
    """The operation had not started when its `deadline_s` was over; it never ran."""


class OperationTimeoutError(TenSafeError, TimeoutError):
    """A wait ended before the operation did; the operation goes on."""


class MissingExtraError(TenSafeError, ImportError):
    """Something needs an extra of the distribution that is not installed."""

    @classmethod
    def of(cls, what: str, extra: str) -> Self:
        """Names what needs it."""
        return cls(
            f"{what} needs the extra tensafe[{extra}], which is not installed",
            remedy=f"pip install 'tensafe[{extra}]'",
        )


class RequestTimeoutError(TenSafeError, TimeoutError):
    """The server did not answer a call in time."""

    remedy = "try again, or give the client a longer timeout_s"


class ChecksumMismatchError(TenSafeError):
    """Bytes do not match their checksum."""


class SampleDivergedError(TenSafeError):
    """A sample was executed again after its worker was lost, and drew other tokens than those that
    its stream had brought."""

    remedy = (
        "drop what the stream brought: its result() has the valid completions. Runs with "
        "deterministic=True never diverge on workers of one kind"
    )


class ServerError(TenSafeError):
    """A fault of the server; its log has the id that stands in the message."""


_BY_REASON: dict[str, type[TenSafeError]] = {
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RUN_NOT_FOUND": RunNotFoundError,
    "OPERATION_NOT_FOUND": OperationNotFoundError,
    "ARTIFACT_NOT_FOUND": ArtifactNotFoundError,
    "ARTIFACT_EXPIRED": ArtifactExpiredError,
    "ARTIFACT_IN_USE": ArtifactInUseError,
    "STORAGE_FULL": StorageFullError,
    "MODEL_NOT_FOUND": ModelNotFoundError,
    "RUN_DELETED": RunDeletedError,
    "SEQ_CONFLICT": SequenceConflictError,
    "SEQ_GAP": SequenceGapError,
    "NAME_TAKEN": NameTakenError,
    "INVALID_BATCH": BatchError,
    "NOTHING_SCORED": BatchError,
    "TOKEN_OUT_OF_RANGE": TokenOutOfRangeError,
    "CONTEXT_EXCEEDED": ContextExceededError,
    "MESSAGE_TOO_LARGE": MessageTooLargeError,
    "UNSUPPORTED_OPTION": UnsupportedOptionError,
    "UNKNOWN_TARGET_MODULE": UnknownTargetModuleError,
    "MAX_STEPS_REACHED": MaxStepsReachedError,
    "WINDOW_POISONED": WindowPoisonedError,
    "EMPTY_WINDOW": EmptyWindowError,
    "MIXED_REDUCTION": MixedReductionError,
    "NON_FINITE_GRADIENT": NonFiniteGradientError,
    "NON_FINITE_LOSS": NonFiniteLossError,
    "ARTIFACT_MISMATCH": ArtifactMismatchError,
    "NO_CHAT_TEMPLATE": NoChatTemplateError,
    "VERSION_NOT_SAVED": VersionNotSavedError,
    "CHECKSUM_MISMATCH": ChecksumMismatchError,
    "OPERATION_CANCELLED": OperationCancelledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "QUEUE_FULL": QueueFullError,
    "OUT_OF_MEMORY": OutOfMemoryError,
    "DRAINING": ConnectionFailedError,
    "RUN_STATE_LOST": ServerError,
    "DP_BUDGET_EXCEEDED": DPBudgetExceededError,
    "DP_STEP_LOST": DPStepLostError,
    "DATASET_NOT_FOUND": DatasetNotFoundError,
    "DATASET_IN_USE": DatasetInUseError,
    "INVALID_DATASET": InvalidDatasetError,
}

_BY_CODE: dict[str, type[TenSafeError]] = {
    "CANCELLED": ConnectionFailedError,  # a call that a server shed; operations have a reason
    "INVALID_ARGUMENT": InvalidArgumentError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": ConflictError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "FAILED_PRECONDITION": PreconditionError,
    "OUT_OF_RANGE": OutOfRangeError,
    "UNAVAILABLE": ConnectionFailedError,
    "DATA_LOSS": ChecksumMismatchError,
    "UNAUTHENTICATED": AuthenticationError,
}


def from_detail(detail: ErrorDetail) -> TenSafeError:
    """Makes the exception of an unpacked wire error: by its reason, else by its code."""
    kind = _BY_REASON.get(detail.reason) or _BY_CODE.get(detail.code, ServerError)
    return kind(
        detail.message or f"the server answered {detail.code} without a message",
        reason=detail.reason,
        code=detail.code,
        metadata=detail.metadata,
        violations=detail.violations,
        retry_delay_s=detail.retry_delay_s,
    )


def from_status(status: status_pb2.Status) -> TenSafeError:
    """Makes the exception of a `google.rpc.Status` (an operation's or an outcome's error)."""
    return from_detail(detail_of_status(status))


def unexpected(doing: str, error: Exception) -> TenSafeError:
    """Makes the error of a fault of the SDK itself, so that futures end instead of waiting."""
    made = TenSafeError(
        f"{doing} failed unexpectedly: {error!r}",
        remedy="attach to the run again with client.training_client(run_id); please report this",
    )
    made.__cause__ = error
    return made


def from_rpc_error(error: grpc.aio.AioRpcError) -> TenSafeError:
    """Makes the exception of a failed call, with or without rich details in its trailers."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the trailers contradict the call's own code
        status = None
    if status is not None:
        return from_status(status)
    return from_detail(
        ErrorDetail(code=error.code().name, reason="", message=error.details() or "")
    )
