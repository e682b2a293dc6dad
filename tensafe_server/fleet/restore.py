"""Bringing a run's state back: its newest full artifact, then the logged operations after it."""

from __future__ import annotations

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.operations.model import SUCCEEDED, RunState
from tensafe_server.operations.voids import is_void_gradient, void_spec
from tensafe_server.store.base import OperationRow, Store

_PAGE = 512
_CHANGES_STATE = {
    ops.OPERATION_KIND_FORWARD_BACKWARD,
    ops.OPERATION_KIND_OPTIM_STEP,
    ops.OPERATION_KIND_LOAD_STATE,
}


class Restorer:
    """Builds the plan that rebuilds a run on a worker."""

    def __init__(self, store: Store, payloads: Payloads) -> None:
        self._store = store
        self._payloads = payloads

    def needed(self, run: RunState) -> bool:
        """Whether the run's state differs from that of its base."""
        return _settled_seq(run) > run.base_seq

    async def plan(self, run: RunState, assignment: pb.RunAssignment) -> pb.Plan:
        """The assignment and every logged operation after the base that changed the run."""
        message = pb.Plan(runs=[assignment])
        message.operations.extend(await self._history(run, run.base_seq, assignment.epoch))
        return message

    async def voids(self, run: RunState) -> pb.Plan:
        """The holes after the last executed operation, for a worker that still has the run."""
        message = pb.Plan()
        message.operations.extend(await self._history(run, run.executed_seq, run.epoch))
        return message

    async def _history(self, run: RunState, after: int, epoch: int) -> list[pb.PlannedOperation]:
        end = _settled_seq(run)
        replayed: list[pb.PlannedOperation] = []
        await self._store.flushed()
        while after < end:
            rows = await self._store.history(run.id, after, _PAGE)
            for row in rows:
                if (row.seq or 0) <= end:
                    replayed += await self._replayed(row, epoch)
            if len(rows) < _PAGE:
                break
            after = rows[-1].seq or end
        return replayed

    async def _replayed(self, row: OperationRow, epoch: int) -> list[pb.PlannedOperation]:
        if is_void_gradient(row):
            return [
                pb.PlannedOperation(
                    operation_id=row.id, epoch=epoch, spec=void_spec(row), void=True
                )
            ]
        failed_step = row.kind == ops.OPERATION_KIND_OPTIM_STEP and row.executed
        if row.kind not in _CHANGES_STATE or not (row.state == SUCCEEDED or failed_step):
            return []
        return [
            pb.PlannedOperation(
                operation_id=row.id,
                epoch=epoch,
                spec=await self._payloads.load(row.spec, row.spec_ref),
                replay=True,
                artifact_id=row.artifact_id or "",
            )
        ]


def _settled_seq(run: RunState) -> int:
    """The last seq of the run that is finished together with all before it."""
    first = run.in_flight[0] if run.in_flight else run.queue[0] if run.queue else None
    return (first.row.seq or 1) - 1 if first is not None else run.next_seq - 1
