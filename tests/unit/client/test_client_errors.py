"""Every reason of the contract has an exception, of the family of its gRPC code."""

from __future__ import annotations

import pytest

from tensafe.v1 import errors_pb2
from tensafe.wire.status import REASON_CODES, TenSafeFault, to_status
from tensafe_client import errors

FAMILIES: dict[str, type[errors.TenSafeError]] = {
    "UNAUTHENTICATED": errors.AuthenticationError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
    "INVALID_ARGUMENT": errors.InvalidArgumentError,
    "NOT_FOUND": errors.NotFoundError,
    "ALREADY_EXISTS": errors.ConflictError,
    "FAILED_PRECONDITION": errors.PreconditionError,
    "OUT_OF_RANGE": errors.OutOfRangeError,
    "RESOURCE_EXHAUSTED": errors.ResourceExhaustedError,
    "DATA_LOSS": errors.ChecksumMismatchError,
    "ABORTED": errors.DPStepLostError,
    "CANCELLED": errors.OperationCancelledError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "UNAVAILABLE": errors.ConnectionFailedError,
    "INTERNAL": errors.ServerError,
    "UNIMPLEMENTED": errors.ServerError,
}


# Faults of the server, though their code is that of damaged bytes.
OURS = {"RUN_STATE_LOST"}


@pytest.mark.parametrize("name", sorted(errors_pb2.ErrorReason.keys())[1:])
def test_every_reason(name: str) -> None:
    reason = name.removeprefix("ERROR_REASON_")
    if reason == "UNSPECIFIED":
        return
    fault = TenSafeFault(reason, "what happened", run_id="run-1")
    error = errors.from_status(to_status(fault.detail))
    family = errors.ServerError if reason in OURS else FAMILIES[REASON_CODES[reason]]
    assert isinstance(error, family)
    assert (error.reason, error.code) == (reason, REASON_CODES[reason])
    assert error.resource == "run-1"
    assert reason in str(error)
    assert "what happened" in str(error)


def test_violations_are_shown_by_field() -> None:
    violations = [("config.lora.rank", "must be at most 1024"), ("config.seed", "too large")]
    fault = TenSafeFault("INVALID_ARGUMENT", "2 fields break a rule", violations=violations)
    text = str(errors.from_status(to_status(fault.detail)))
    assert "config.lora.rank: must be at most 1024" in text
    assert "config.seed: too large" in text


def test_retry_delay_is_kept() -> None:
    fault = TenSafeFault("QUEUE_FULL", "full", retry_delay_s=0.5)
    assert errors.from_status(to_status(fault.detail)).retry_delay_s == 0.5
