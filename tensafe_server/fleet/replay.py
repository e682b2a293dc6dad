"""What workers tell of replays is compared with the log, and never settles anything."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import from_status
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.operations.comparison import (
    error_difference,
    result_difference,
)
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.store.base import OperationRow, Store

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lineage:
    """Whether a replay is on its way to the bits of the log.

    Attributes:
        exact: the run promises the same bits, and all that was replayed so far first ran on a
            worker of this kind.
    """

    digest: str
    exact: bool

    @classmethod
    def of(cls, run: RunState, link: WorkerLink) -> Lineage:
        """A run's replay that begins on this worker."""
        return cls(link.digest, run.config.deterministic or link.backend == "mock")

    def pass_by(self, row: OperationRow) -> bool:
        """Takes the next operation in; whether every bit of its result must agree."""
        self.exact = self.exact and row.fingerprint == self.digest
        return self.exact


class Comparer:
    """Compares replayed outcomes with logged ones."""

    def __init__(self, store: Store, payloads: Payloads) -> None:
        self._store = store
        self._payloads = payloads

    async def row(self, tenant_id: str, operation_id: str) -> OperationRow | None:
        return await self._store.operation(tenant_id, operation_id)

    async def difference(
        self, row: OperationRow, done: pb.OperationDone, exact: bool
    ) -> str | None:
        """What differs, for people; None if nothing does."""
        logged = Status.FromString(row.error) if row.error is not None else None
        if difference := error_difference(logged, done.error if done.HasField("error") else None):
            return difference
        if logged is not None:
            return None
        try:
            data = await self._payloads.load(row.result, row.result_ref)
        except (BlobNotFoundError, DamagedPayloadError):
            return "the logged result is damaged or missing"
        if not data:
            return None  # pruned to nothing
        return result_difference(
            ops.OperationResult.FromString(data),
            done.result,
            exact=exact,
            pruned=row.result_pruned,
        )


class ReplayWatch:
    """Compares the replays of recoveries, behind the reports that bring them.

    Attributes:
        compared: replayed outcomes compared since the start.
        mismatches: of them, those that differed.
    """

    def __init__(
        self, store: Store, ledger: Ledger, comparer: Comparer, snapshots: SnapshotBook
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._comparer = comparer
        self._snapshots = snapshots
        self._lineages: dict[str, tuple[int, Lineage]] = {}
        self._queue: asyncio.Queue[tuple[RunState, Lineage, pb.OperationDone]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.compared = 0
        self.mismatches = 0

    def take(self, link: WorkerLink, done: pb.OperationDone) -> None:
        """Takes a replayed outcome in, if the worker has the run rightly."""
        run = self._ledger.runs.get(done.run_id)
        if run is None or run.epoch != done.epoch or run.worker_id != link.id:
            return
        epoch, lineage = self._lineages.get(run.id, (0, Lineage("", False)))
        if epoch != run.epoch:
            lineage = Lineage.of(run, link)
            self._lineages[run.id] = (run.epoch, lineage)
        self._queue.put_nowait((run, lineage, done))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def refused(self, run: RunState, link: WorkerLink, refused: pb.RefusedSnapshot) -> None:
        """Notes that a worker could not load a snapshot: if it gets the run again, it is with the
        one before."""
        fault = from_status(refused.error)
        run.useless_snapshots.setdefault(refused.snapshot_id, set()).add(link.instance)
        self._snapshots.damaged += 1
        log.error("a snapshot of %s is not used by %s: %s", run.id, link.name, fault.message)

    async def _work(self) -> None:
        while not self._queue.empty():
            run, lineage, done = self._queue.get_nowait()
            try:
                await self._compare(run, lineage, done)
            except Exception:
                log.exception("a replay of %s could not be compared", done.operation_id)

    async def _compare(self, run: RunState, lineage: Lineage, done: pb.OperationDone) -> None:
        row = await self._comparer.row(run.tenant_id, done.operation_id)
        if row is None:
            return
        difference = await self._comparer.difference(row, done, lineage.pass_by(row))
        self.compared += 1
        if difference is None:
            return
        self.mismatches += 1
        run.replay_mismatches += 1
        log.error(
            "replay mismatch in run %s: operation %s (seq %d): %s",
            *(run.id, row.id, row.seq or 0, difference),
        )
        await self._store.count_mismatch(run.id)
