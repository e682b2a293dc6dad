"""What a failure leaves behind, and how it is told.

The log goes on from what it was told: after an operation that failed, a run is as a replay of the
log will have it, or it is left to its next assignment.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from tensafe.v1 import worker_pb2
from tensafe.wire.status import TenSafeFault, to_status
from workers.backend import Backend, NoisedFault

log = logging.getLogger(__name__)

_OF_THE_MOMENT = frozenset({"OUT_OF_MEMORY", "INTERNAL"})
"""Reasons that another try may not find; as in `tensafe_server/operations/voids.py`."""
FAILS_ALONE = frozenset({"forward_backward", "load_state"})
"""Operations of which nothing is in a replay once they have failed."""
USELESS = frozenset({"CHECKSUM_MISMATCH", "ARTIFACT_MISMATCH", "ARTIFACT_NOT_FOUND"})
"""Reasons for which a recovery point that they befall is not tried again."""
# The recovery point that the next assignment names is looked at anew, and may be another one.
_PASSES_BY = USELESS - {"ARTIFACT_MISMATCH"} | {
    "INTERNAL",
    "OUT_OF_MEMORY",
    "WORKER_DISK_FULL",
    "STORAGE_FULL",
    "STORAGE_UNAVAILABLE",
    "DRAINING",
}


class RunLostError(Exception):
    """A run is not where its log has it, and cannot be brought there but by a replay.

    Attributes:
        fault: why.
    """

    def __init__(self, run_id: str, error: Exception) -> None:
        super().__init__(str(error))
        self.fault = as_fault(error, f"keeping the state of {run_id}")


class OrderLeftError(RunLostError):
    """It was not there before the operation at hand, of which nothing was done."""


@contextmanager
def closed_over(
    backend: Backend, kind: str, planned: worker_pb2.PlannedOperation, run_id: str
) -> Iterator[None]:
    """Leaves a run's window as the log has it when the operation fails that is executed in here.

    A gradient that failed is missing from its window, whatever it was that failed; an update that
    failed for a reason that another try may not find has closed its window, and so has any of a
    private run. The coordinator's half is `tensafe_server/operations/voids.py`.

    Raises:
        RunLostError: that cannot be had.
    """
    try:
        yield
    except RunLostError:
        raise
    except Exception as error:
        close_over(backend, kind, planned, run_id, error)
        raise


def close_over(
    backend: Backend,
    kind: str,
    planned: worker_pb2.PlannedOperation,
    run_id: str,
    error: Exception,
) -> None:
    """As `closed_over`, for an operation that has failed."""
    private = planned.HasField("charge")
    reason = error.detail.reason if isinstance(error, TenSafeFault) else "INTERNAL"
    try:
        if kind == "forward_backward":
            backend.poison(run_id)
        elif (private or reason in _OF_THE_MOMENT) and not planned.replay:
            backend.drop_window(run_id)
    except Exception as lost:
        raise RunLostError(run_id, lost) from lost


@contextmanager
def applied(run_id: str) -> Iterator[None]:
    """What fails in here has changed the run.

    Raises:
        RunLostError: something failed.
    """
    try:
        yield
    except Exception as error:
        raise RunLostError(run_id, error) from error


def as_fault(error: Exception, what: str) -> TenSafeFault:
    """A known fault as it is; anything else as INTERNAL, its text for the log only."""
    if isinstance(error, TenSafeFault):
        return error
    error_id = secrets.token_hex(6)
    log.error("%s failed, error id %s", what, error_id, exc_info=error)
    return TenSafeFault(
        "INTERNAL",
        f"the worker failed for a reason of its own, error id {error_id}; tell the operator, "
        "whose log has the details",
        error_id=error_id,
    )


def fail(
    done: worker_pb2.OperationDone, error: Exception, planned: worker_pb2.PlannedOperation
) -> None:
    """Fills in why an operation failed, and whether its charge is unused."""
    fault = as_fault(error, f"operation {done.operation_id}")
    done.error.CopyFrom(to_status(fault.detail))
    if planned.HasField("charge"):
        # What failed for an unknown reason may have been noised.
        done.charge_unused = isinstance(error, TenSafeFault) and not isinstance(error, NoisedFault)


def passes_by(fault: TenSafeFault) -> bool:
    """Whether a run that could not be taken on may be at another time, or by another worker."""
    return fault.detail.reason in _PASSES_BY


def given_up(
    run_id: str, epoch: int, fault: TenSafeFault, begun: str = ""
) -> worker_pb2.RefusedSnapshot:
    """What the coordinator is told of a run that did not come to where the log has it; `begun`: by
    which operation."""
    error = to_status(fault.detail)
    return worker_pb2.RefusedSnapshot(run_id=run_id, epoch=epoch, error=error, operation_id=begun)
