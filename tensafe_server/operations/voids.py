"""Operations that ended before they ran, but must be known where they would have run.

A forward_backward that was refused or cancelled leaves a hole in its accumulation window; the
worker has to hear of it at its place in the order, or it would step on half a gradient.
"""

from __future__ import annotations

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe_server.store.base import OperationRow


def is_void_gradient(row: OperationRow) -> bool:
    """Whether a finished operation was a forward_backward without effect, or never came at all."""
    return (
        row.kind in (ops.OPERATION_KIND_FORWARD_BACKWARD, ops.OPERATION_KIND_UNSPECIFIED)
        and row.state != ops.OPERATION_STATE_SUCCEEDED
    )


def void_spec(row: OperationRow) -> bytes:
    """What stands in for the spec of a void operation: its place, and no content."""
    return training.OperationSpec(
        run_id=row.run_id or "",
        seq=row.seq or 0,
        forward_backward=training.ForwardBackward(),
    ).SerializeToString()
