"""The book of what is unfinished: runs, their order, and operations that have not ended.

It holds state and keeps its rules; it neither reads nor writes the store.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.model import PendingOperation, RunState
from tensafe_server.operations.voids import merged

_READS_ARTIFACT = {
    ops.OPERATION_KIND_LOAD_STATE,
    ops.OPERATION_KIND_SAMPLE,
    ops.OPERATION_KIND_FORWARD,
    ops.OPERATION_KIND_FORWARD_BACKWARD,
}
_CHANGES_RUN = {
    ops.OPERATION_KIND_FORWARD_BACKWARD,
    ops.OPERATION_KIND_OPTIM_STEP,
    ops.OPERATION_KIND_LOAD_STATE,
}
SPEC_MEMORY_BYTES = 64 * 2**20
"""Specs of waiting operations in memory, all tenants together; the others are read from the store
when their turn comes."""
VOIDS_KEPT = 256
"""Void operations that may lie in a run's queue one by one; beyond, and if they are more than half
of it, those side by side become one."""


@dataclass(slots=True)
class Usage:
    """What one tenant, or all of them, have waiting."""

    operations: int = 0
    bytes: int = 0


class Ledger:
    """Runs and unfinished operations.

    Attributes:
        lane: operations without a place in a run's order that no worker has, oldest first.
        on_ready: called when there is something new to dispatch.
        total: what all tenants together have waiting.
        on_deadline: called with an accepted operation that has a deadline.
        on_gap: called with a run whose order has, or no longer has, a missing seq.
        on_disputed: called with a run whose operation has ended here as if it had never run, though
            it was sent under the newest assignment: whoever holds the run under that may contradict
            the log, and is not to be believed any more.
        on_over: called with a deleted run of which nothing is unfinished any more.
    """

    def __init__(
        self, spec_memory_bytes: int = SPEC_MEMORY_BYTES, voids_kept: int = VOIDS_KEPT
    ) -> None:
        self._voids_kept = voids_kept
        self.total = Usage()
        self.on_deadline: Callable[[PendingOperation], None] = lambda operation: None
        self._spec_memory_bytes = spec_memory_bytes
        self._spec_bytes_held = 0
        self.runs: dict[str, RunState] = {}
        self.lane: deque[PendingOperation] = deque()
        self.lane_in_flight: dict[str, PendingOperation] = {}
        self.on_ready: Callable[[], None] = lambda: None
        self.on_gap: Callable[[RunState], None] = lambda run: None
        self.on_disputed: Callable[[RunState], None] = lambda run: None
        self.on_over: Callable[[RunState], None] = lambda run: None
        self._pending: dict[str, PendingOperation] = {}
        self._requests: dict[tuple[str, str], PendingOperation] = {}
        self._ready: set[str] = set()
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)

    # Runs.

    def find_run(self, tenant_id: str, run_id: str) -> RunState | None:
        """A tenant's run; another tenant's is None, like one that does not exist."""
        run = self.runs.get(run_id)
        return run if run is not None and run.tenant_id == tenant_id else None

    def run(self, tenant_id: str, run_id: str) -> RunState:
        """A tenant's run.

        Raises:
            TenSafeFault: RUN_NOT_FOUND.
        """
        run = self.find_run(tenant_id, run_id)
        if run is None:
            raise _no_run(run_id, "`tensafe runs list` shows yours")
        return run

    def any_run(self, run_id: str) -> RunState:
        """A run of any tenant, for operators.

        Raises:
            TenSafeFault: RUN_NOT_FOUND.
        """
        run = self.runs.get(run_id)
        if run is None:
            raise _no_run(run_id, "`tensafe admin runs list` shows all tenants'")
        return run

    def ready_runs(self) -> list[RunState]:
        """Runs with something to dispatch."""
        self._ready = {run_id for run_id in self._ready if self.runs[run_id].queue}
        return [self.runs[run_id] for run_id in sorted(self._ready)]

    def rest(self, run: RunState) -> None:
        """The run has nothing to dispatch until something is admitted or recalled."""
        self._ready.discard(run.id)

    # Operations.

    @property
    def unfinished(self) -> int:
        """How many operations have not ended, of all tenants."""
        return len(self._pending)

    def pending(self, operation_id: str) -> PendingOperation | None:
        return self._pending.get(operation_id)

    def reader_of(self, artifact_id: str) -> str | None:
        """An unfinished operation that reads an artifact, in words; None if there is none."""
        for operation in self._pending.values():
            row = operation.row
            if row.artifact_id == artifact_id and row.kind in _READS_ARTIFACT:
                return f"operation {row.id}"
        return None

    def by_request(self, tenant_id: str, request_id: str) -> PendingOperation | None:
        return self._requests.get((tenant_id, request_id))

    def usage(self, tenant_id: str) -> Usage:
        return self._usage[tenant_id]

    def reserve(self, operation: PendingOperation, run: RunState | None) -> None:
        """Takes the operation's place, so that a second one with the same seq finds it."""
        row = operation.row
        self._pending[row.id] = operation
        if run is not None and row.seq is not None:
            run.by_seq[row.seq] = operation
        if row.request_id is not None:
            self._requests[row.tenant_id, row.request_id] = operation
        for usage in (self.usage(row.tenant_id), self.total):
            usage.operations += 1
            usage.bytes += operation.spec_bytes

    def hold(self, operation: PendingOperation, spec: bytes) -> None:
        """Keeps a spec in memory until the operation is sent or has ended."""
        if operation.void or operation.row.id not in self._pending or operation.spec is not None:
            return
        operation.spec = spec
        self._spec_bytes_held += len(spec)

    def drop_spec(self, operation: PendingOperation) -> None:
        """Forgets a spec that `hold` keeps; it can be read again from the store."""
        if operation.spec is not None:
            self._spec_bytes_held -= len(operation.spec)
            operation.spec = None

    def _keep_or_drop(self, operation: PendingOperation) -> None:
        # It is on disk now, so that memory is only a shortcut.
        spec, operation.spec, operation.row.spec = operation.spec, None, None
        if spec is not None and self._spec_bytes_held + len(spec) <= self._spec_memory_bytes:
            self.hold(operation, spec)

    def withdraw(self, operations: Iterable[PendingOperation]) -> None:
        """Forgets operations that could not be stored: they were never accepted."""
        for operation in operations:
            operation.spec = None  # not yet counted among those held
            self._forget(operation)

    def admit(self, operations: Iterable[PendingOperation]) -> None:
        """Puts stored operations into their order."""
        touched: dict[str, RunState] = {}
        now_s = time.monotonic()
        for operation in operations:
            row = operation.row
            self._keep_or_drop(operation)
            if row.deadline_ns is not None and not operation.void:
                self.on_deadline(operation)
            operation.ready_s = now_s
            if row.seq is None:
                if operation.void:
                    self._forget(operation)
                else:
                    self.lane.append(operation)
                continue
            run = self.runs[row.run_id or ""]
            touched[run.id] = run
            if row.seq == run.next_seq:
                run.queue.append(operation)
                run.next_seq += 1
            else:
                run.early[row.seq] = operation
            if operation.void:
                self._forget(operation)
                run.new_voids += 1
        for run in touched.values():
            while run.next_seq in run.early:
                run.queue.append(run.early.pop(run.next_seq))
                run.next_seq += 1
            self._ready.add(run.id)
            self._merge_voids(run)
            self.on_gap(run)
        self.on_ready()

    def resume(self, run: RunState, operations: Sequence[PendingOperation], reached: int) -> None:
        """Takes up a run's order after a restart: everything up to `reached` was sent to a worker,
        and of that only these, in order, have not ended."""
        for operation in operations:
            self.reserve(operation, run)
            if operation.row.deadline_ns is not None:
                self.on_deadline(operation)
            run.queue.append(operation)
        run.next_seq = reached + 1
        self._ready.add(run.id)

    def void(self, operation: PendingOperation) -> None:
        """Ends an operation where it waits: it is not to run. From here on the dispatcher passes it
        over, even before its outcome is on disk."""
        operation.void = True
        run = self.runs.get(operation.row.run_id or "")
        if run is None or operation.row.kind not in _CHANGES_RUN:
            return
        if operation.worker_id is None and operation.sent_under == run.epoch > 0:
            self.on_disputed(run)

    def retire(self, operation: PendingOperation) -> None:
        """Takes a finished operation out. If no worker had it, its void stays in the order."""
        row = operation.row
        if row.run_id is not None and row.seq is not None:
            run = self.runs[row.run_id]
            run.active_s = time.monotonic()
            if operation.worker_id is None:
                operation.void = True
                run.new_voids += 1
            else:
                run.in_flight.remove(operation)
            if row.executed:
                run.executed_seq = max(run.executed_seq, row.seq)
        elif operation.worker_id is not None:
            self.lane_in_flight.pop(row.id, None)
        else:
            self.lane.remove(operation)
        self._forget(operation)
        operation.notify_finished()
        if row.run_id is not None and row.seq is not None:
            run = self.runs[row.run_id]
            self._merge_voids(run)
            if run.deleted and not run.by_seq:
                self.on_over(run)

    def _merge_voids(self, run: RunState) -> None:
        """Keeps the queue about as long as what waits in it, however many ended where they waited:
        of void operations side by side one is left, which tells of their hole if they leave one."""
        if run.deleted and not run.by_seq:
            run.queue.clear()  # nobody will take it on any more
            run.new_voids = 0
        if run.new_voids <= self._voids_kept or 2 * run.new_voids + 1 < len(run.queue):
            return
        run.new_voids = 0
        ended = (op.void and op.row.id not in self._pending for op in run.queue)
        queue: deque[PendingOperation] = deque()
        before = False
        for operation, is_over in zip(run.queue, ended, strict=True):
            if before and is_over and queue[-1].seqs[1] + 1 == operation.seqs[0]:
                queue.append(merged(queue.pop(), operation, private=run.private is not None))
            else:
                queue.append(operation)
            before = is_over
        run.queue = queue

    def recall(self, worker_id: str) -> list[RunState]:
        """Takes back everything that a lost worker had; returns the runs it held."""
        for operation in [p for p in self.lane_in_flight.values() if p.worker_id == worker_id]:
            self.recall_alone(operation)
        held = [run for run in self.runs.values() if run.worker_id == worker_id]
        for run in held:
            self.recall_run(run)
        return held

    def recall_alone(self, operation: PendingOperation) -> None:
        """Takes an operation without a place in a run back from its worker."""
        del self.lane_in_flight[operation.row.id]
        if not operation.finishing:
            operation.worker_id = None
            self.lane.appendleft(operation)

    def recall_run(self, run: RunState) -> list[PendingOperation]:
        """Takes a run, and what its worker had of it, back; returns those operations."""
        run.worker_id = None
        run.restoring = run.arriving = False
        recalled = [operation for operation in run.in_flight if not operation.finishing]
        for operation in reversed(recalled):
            operation.worker_id = None
            run.queue.appendleft(operation)
        run.in_flight = deque(op for op in run.in_flight if op.finishing)
        self._ready.add(run.id)
        return recalled

    def _forget(self, operation: PendingOperation) -> None:
        row = operation.row
        if self._pending.pop(row.id, None) is None:
            return
        if row.run_id is not None and row.seq is not None:
            self.runs[row.run_id].by_seq.pop(row.seq, None)
        if row.request_id is not None:
            self._requests.pop((row.tenant_id, row.request_id), None)
        for usage in (self.usage(row.tenant_id), self.total):
            usage.operations -= 1
            usage.bytes -= operation.spec_bytes
        self.drop_spec(operation)
        operation.stop_deadline()


def _no_run(run_id: str, remedy: str) -> TenSafeFault:
    return TenSafeFault("RUN_NOT_FOUND", f"no run {run_id!r}; {remedy}", run_id=run_id)
