"""Errors on the wire: `google.rpc.Status` with ErrorInfo, BadRequest and RetryInfo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "tensafe"
_MAX_TEXT = 1024
_MAX_VIOLATIONS = 16

# gRPC's canonical codes, so that this module needs no grpc.
CODES = {
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}

# The code that each ErrorReason comes with.
REASON_CODES = {
    "UNAUTHENTICATED": "UNAUTHENTICATED",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "INVALID_ARGUMENT": "INVALID_ARGUMENT",
    "RUN_NOT_FOUND": "NOT_FOUND",
    "OPERATION_NOT_FOUND": "NOT_FOUND",
    "ARTIFACT_NOT_FOUND": "NOT_FOUND",
    "MODEL_NOT_FOUND": "NOT_FOUND",
    "TENANT_NOT_FOUND": "NOT_FOUND",
    "KEY_NOT_FOUND": "NOT_FOUND",
    "RUN_DELETED": "FAILED_PRECONDITION",
    "SEQ_CONFLICT": "ALREADY_EXISTS",
    "SEQ_GAP": "FAILED_PRECONDITION",
    "REQUEST_ID_CONFLICT": "ALREADY_EXISTS",
    "NAME_TAKEN": "ALREADY_EXISTS",
    "INVALID_BATCH": "INVALID_ARGUMENT",
    "TOKEN_OUT_OF_RANGE": "OUT_OF_RANGE",
    "CONTEXT_EXCEEDED": "OUT_OF_RANGE",
    "NOTHING_SCORED": "INVALID_ARGUMENT",
    "MESSAGE_TOO_LARGE": "INVALID_ARGUMENT",
    "UNSUPPORTED_OPTION": "INVALID_ARGUMENT",
    "UNKNOWN_TARGET_MODULE": "INVALID_ARGUMENT",
    "INVALID_PAGE_TOKEN": "INVALID_ARGUMENT",
    "MAX_STEPS_REACHED": "FAILED_PRECONDITION",
    "WINDOW_POISONED": "FAILED_PRECONDITION",
    "EMPTY_WINDOW": "FAILED_PRECONDITION",
    "MIXED_REDUCTION": "FAILED_PRECONDITION",
    "NON_FINITE_GRADIENT": "FAILED_PRECONDITION",
    "NON_FINITE_LOSS": "INVALID_ARGUMENT",
    "ARTIFACT_MISMATCH": "FAILED_PRECONDITION",
    "NO_CHAT_TEMPLATE": "FAILED_PRECONDITION",
    "VERSION_NOT_SAVED": "FAILED_PRECONDITION",
    "CHECKSUM_MISMATCH": "DATA_LOSS",
    "OPERATION_CANCELLED": "CANCELLED",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "STALE_ASSIGNMENT": "FAILED_PRECONDITION",
    "EXECUTOR_HUNG": "FAILED_PRECONDITION",
    "QUEUE_FULL": "RESOURCE_EXHAUSTED",
    "OUT_OF_MEMORY": "RESOURCE_EXHAUSTED",
    "DRAINING": "UNAVAILABLE",
    "STORAGE_FULL": "RESOURCE_EXHAUSTED",
    "STORAGE_UNAVAILABLE": "UNAVAILABLE",
    "ARTIFACT_EXPIRED": "NOT_FOUND",
    "ARTIFACT_IN_USE": "FAILED_PRECONDITION",
    "UPLOAD_NOT_FOUND": "NOT_FOUND",
    "WORKER_DISK_FULL": "RESOURCE_EXHAUSTED",
    "CURSOR_OUT_OF_RANGE": "OUT_OF_RANGE",
    "UNIMPLEMENTED": "UNIMPLEMENTED",
    "RUN_STATE_LOST": "DATA_LOSS",
    "NO_WORKER": "UNAVAILABLE",
    "RESULT_EXPIRED": "FAILED_PRECONDITION",
    "DP_BUDGET_EXCEEDED": "FAILED_PRECONDITION",
    "DP_STEP_LOST": "ABORTED",
    "DATASET_NOT_FOUND": "NOT_FOUND",
    "DATASET_IN_USE": "FAILED_PRECONDITION",
    "INVALID_DATASET": "INVALID_ARGUMENT",
    "INTERNAL": "INTERNAL",
}


@dataclass(frozen=True)
class ErrorDetail:
    """An error as it goes over the wire.

    Attributes:
        code: gRPC code name (`INVALID_ARGUMENT`).
        reason: name of an `ErrorReason` without prefix, or empty if the peer sent none.
        message: what happened, to what, and what to do.
        metadata: every variable of the message, by name (`run_id`, `field`, …).
        violations: (field, description) of each broken rule.
        retry_delay_s: when a retry may help, seconds; None if it will not.
    """

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[tuple[str, str]] = ()
    retry_delay_s: float | None = None


class TenSafeFault(Exception):  # noqa: N818 - it names what happened, on the server's side
    """Raised where the coordinator or a worker refuses or fails something for a known reason."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_delay_s: float | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(message)
        if field is not None:
            violations = [(field, message), *violations]
        if violations:
            metadata["field"] = violations[0][0]
        self.detail = ErrorDetail(
            code=REASON_CODES[reason],
            reason=reason,
            message=message,
            metadata={key: str(value) for key, value in metadata.items()},
            violations=tuple(violations),
            retry_delay_s=retry_delay_s,
        )


def to_status(error: ErrorDetail) -> status_pb2.Status:
    """Packs an error. Texts are cut so that it fits into gRPC's trailers (8 KB)."""
    details = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={key: value[:256] for key, value in error.metadata.items()},
        )
    ]
    packed = [_pack(detail) for detail in details]
    if error.violations:
        packed.append(
            _pack(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=name[:128], description=text[:256]
                        )
                        for name, text in error.violations[:_MAX_VIOLATIONS]
                    ]
                )
            )
        )
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(
        code=CODES[error.code], message=error.message[:_MAX_TEXT], details=packed
    )


def from_status(status: status_pb2.Status) -> ErrorDetail:
    """Unpacks an error; details of other domains are passed over."""
    names = {number: name for name, number in CODES.items()}
    reason, metadata, violations, retry = "", {}, [], None
    info, bad, again = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(again):
            retry = again.retry_delay.ToNanoseconds() / 1e9
    return ErrorDetail(
        code=names.get(status.code, "UNKNOWN"),
        reason=reason,
        message=status.message,
        metadata=metadata,
        violations=violations,
        retry_delay_s=retry,
    )


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
