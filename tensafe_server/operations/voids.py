"""Operations that ended before they ran, but must be known where they would have run.

A forward_backward that was refused or cancelled leaves a hole in its accumulation window; the
worker has to hear of it at its place in the order, or it would step on half a gradient. So does a
private step that was lost with its worker: the sum that it was to noise is gone. An update that
failed for want of memory closed its window all the same, and must not succeed when it is replayed.
"""

from __future__ import annotations

from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import from_status
from tensafe_server.operations.model import PendingOperation
from tensafe_server.store.base import OperationRow

_OF_THE_MOMENT = frozenset({"OUT_OF_MEMORY", "INTERNAL"})


def is_void(row: OperationRow, *, private: bool) -> bool:
    """Whether a finished operation is only a mark in the order of its run.

    It was a forward_backward without effect, or never came at all; or an optim_step that has closed
    its window without an update, for a reason that another try may not find, or in a private run,
    where there is none.
    """
    if row.state == ops.OPERATION_STATE_SUCCEEDED:
        return False
    if row.kind == ops.OPERATION_KIND_OPTIM_STEP:
        return row.executed and (private or _reason(row) in _OF_THE_MOMENT)
    return row.kind in (ops.OPERATION_KIND_FORWARD_BACKWARD, ops.OPERATION_KIND_UNSPECIFIED)


def _reason(row: OperationRow) -> str:
    return from_status(Status.FromString(row.error)).reason if row.error is not None else ""


def void_spec(row: OperationRow) -> bytes:
    """What stands in for the spec of a void operation: its place, and no content."""
    spec = training.OperationSpec(run_id=row.run_id or "", seq=row.seq or 0)
    if row.kind == ops.OPERATION_KIND_OPTIM_STEP:
        spec.optim_step.SetInParent()
    else:
        spec.forward_backward.SetInParent()
    return spec.SerializeToString()


def merged(
    earlier: PendingOperation, later: PendingOperation, *, private: bool
) -> PendingOperation:
    """What stands for two void operations, of which one comes right after the other.

    Nothing was executed between them, so that their holes are in one window, and one is enough.
    """
    stretch = earlier.seqs[0], later.seqs[1]
    leaves_none = not is_void(later.row, private=private)
    kept = earlier if leaves_none and is_void(earlier.row, private=private) else later
    kept.stretch = stretch
    return kept
