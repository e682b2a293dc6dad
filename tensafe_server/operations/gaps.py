"""A missing seq is waited for, but not for ever."""

from __future__ import annotations

import asyncio
import time

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault, to_status
from tensafe_server.events.hub import EventHub
from tensafe_server.ids import new_id
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import FAILED, PendingOperation, RunState
from tensafe_server.operations.outcomes import Ending, Outcomes, ended_event
from tensafe_server.store.base import OperationRow, Store


class GapWatch:
    """Closes the gaps in a run's order that nobody fills.

    The operations behind a gap fail, and so do the missing seqs themselves: they are recorded as
    failed, so that the order is whole again and the run goes on with the seq after them.
    """

    def __init__(
        self, store: Store, ledger: Ledger, hub: EventHub, outcomes: Outcomes, timeout_s: float
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._hub = hub
        self._outcomes = outcomes
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    def update(self, run: RunState) -> None:
        """Starts or stops the clock of a run, as its order demands."""
        if run.gap_timer is not None and (not run.early or run.gap_seq != run.next_seq):
            run.gap_timer.cancel()
            run.gap_timer = None
        if run.early and run.gap_timer is None:
            run.gap_seq = run.next_seq
            loop = asyncio.get_running_loop()
            run.gap_timer = loop.call_later(self._timeout_s, self._expire, run)

    def _expire(self, run: RunState) -> None:
        run.gap_timer = None
        task = asyncio.get_running_loop().create_task(self.close(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, run: RunState) -> None:
        """Ends the waiting for what is missing; no effect without a gap."""
        if not run.early:
            return
        # What is being stored is not missing.
        came = run.early.keys() | run.by_seq.keys()
        missing = [seq for seq in range(run.next_seq, max(run.early)) if seq not in came]
        if not missing:
            self.update(run)
            return
        waiting = [operation for operation in run.early.values() if not operation.void]
        endings = [Ending(operation, error=_fault(run, missing[0]).detail) for operation in waiting]
        placeholders = [self._placeholder(run, seq) for seq in missing]
        for operation in waiting:
            self._ledger.void(operation)
        for operation in placeholders:
            self._ledger.reserve(operation, run)
        await self._outcomes.settle(endings)
        for operation in placeholders:
            operation.row.cursor = self._hub.next_cursor()

        def admit() -> None:
            self._ledger.admit(placeholders)
            self._hub.publish([ended_event(operation) for operation in placeholders])

        rows = [operation.row for operation in placeholders]
        await self._store.add_operations(rows, admit, insist=True)

    def _placeholder(self, run: RunState, seq: int) -> PendingOperation:
        now = time.time_ns()
        row = OperationRow(
            id=new_id("op"),
            tenant_id=run.tenant_id,
            run_id=run.id,
            seq=seq,
            request_id=None,
            session_id="",
            kind=ops.OPERATION_KIND_UNSPECIFIED,
            state=FAILED,
            executed=False,
            spec_hash=b"",
            spec=None,
            spec_ref=None,
            artifact_id=None,
            cost=0.0,
            created_ns=now,
            error=to_status(_fault(run, seq).detail).SerializeToString(),
            finished_ns=now,
        )
        return PendingOperation(row, None, run.model, void=True)


def _fault(run: RunState, missing: int) -> TenSafeFault:
    return TenSafeFault(
        "SEQ_GAP",
        f"seq {missing} of run {run.id} did not come in time, so nothing behind it can run; go on "
        "with the seq that AttachRun tells",
        run_id=run.id,
        missing_seq=missing,
    )
