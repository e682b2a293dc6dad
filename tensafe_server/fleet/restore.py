"""Bringing a run back: its newest intact recovery point, then the logged operations after it.

A recovery point is a snapshot, the newest artifact with the run's whole state, or, as long as
nothing of the log was pruned, a fresh adapter. Each is read and compared with its sums before it is
relied upon; what is damaged is passed over, in the log and counted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.operations.model import SUCCEEDED, PendingOperation, RunState
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.operations.voids import is_void, void_spec
from tensafe_server.privacy.steps import PrivateSteps
from tensafe_server.store.base import OperationRow, SnapshotRow, Store

log = logging.getLogger(__name__)

_PAGE = 512
_CHANGES_STATE = {
    ops.OPERATION_KIND_FORWARD_BACKWARD,
    ops.OPERATION_KIND_OPTIM_STEP,
    ops.OPERATION_KIND_LOAD_STATE,
}


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """Where a replay begins: a snapshot, an artifact, or neither (a fresh adapter).

    Attributes:
        seq: the last operation whose effect it has.
    """

    seq: int
    snapshot: SnapshotRow | None = None
    artifact_id: str = ""

    def assignment(self, run: RunState, run_id: str, epoch: int) -> pb.RunAssignment:
        """Says to a worker what to take on."""
        return pb.RunAssignment(
            run_id=run_id,
            epoch=epoch,
            config=run.config,
            artifact_id=self.artifact_id,
            snapshot_id=self.snapshot.id if self.snapshot is not None else "",
            seq=self.seq,
        )

    def __str__(self) -> str:
        if self.snapshot is not None:
            return f"snapshot {self.snapshot.id} at seq {self.seq}"
        return f"artifact {self.artifact_id} at seq {self.seq}" if self.artifact_id else "its start"


@dataclass(slots=True)
class Onward:
    """How a worker comes to where a run stands.

    Between the logged operations lie the waiting ones that were sent before and have not ended,
    while later ones did: a SAMPLE that a lost worker was at has to begin again from the weights of
    its place in the order.

    Attributes:
        reached: the last operation that it takes the run to.
        logged: what is in the log, by seq.
        specs: of the waiting operations up to `reached`, by id; not of those whose spec is gone.
        assignment: what to take on first; None for a worker that has the run.
        lost: waiting samples whose weights cannot be had any more, and why.
    """

    reached: int
    logged: list[tuple[int, pb.PlannedOperation]]
    specs: dict[str, bytes]
    assignment: pb.RunAssignment | None = None
    lost: list[tuple[PendingOperation, TenSafeFault]] = field(default_factory=list)


class Restorer:
    """Finds recovery points, and what is to be replayed after them."""

    def __init__(
        self, store: Store, payloads: Payloads, snapshots: SnapshotBook, private: PrivateSteps
    ) -> None:
        self._private = private
        self._store = store
        self._payloads = payloads
        self._snapshots = snapshots

    def needed(self, run: RunState) -> bool:
        """Whether the run has a past."""
        return run.reached_seq > 0

    async def plan(self, run: RunState, epoch: int, worker: str = "") -> Onward:
        """The assignment, and all that comes after its recovery point up to where the run stands.

        Args:
            worker: whom it is for, `Register.instance`; it gets no snapshot that it could not load.

        Raises:
            TenSafeFault: RUN_STATE_LOST.
        """
        await self.settled(run)
        async with run.past_kept():
            point, lost = await self._begin(run, worker)
            onward = await self._onward(run, point.seq, epoch)
        onward.assignment = point.assignment(run, run.id, epoch)
        onward.lost = lost
        log.info(
            "restoring %s under epoch %d from %s and %d operations after it",
            *(run.id, epoch, point, len(onward.logged)),
        )
        return onward

    async def has_artifact(self, artifact_id: str, files: Sequence[ArtifactFile]) -> bool:
        """Whether an artifact's files are there as a worker has stored them."""
        try:
            return await self._snapshots.are_intact(f"artifacts/{artifact_id}", files)
        except BlobNotFoundError:
            return False

    async def is_of_this_log(self, run: RunState, held: pb.HeldRun) -> bool:
        """Whether what a worker was sent of a run is what the log has of it. A disk that has lost
        what was last written, or a backup that was put in its place, has given seqs again."""
        reached = max(held.last_seq, held.planned_seq)
        unfinished = {op.row.id for seq, op in run.by_seq.items() if seq <= reached and not op.void}
        known = set(held.operation_ids)
        if not unfinished <= known:
            log.warning("a worker has other operations of %s than the log", run.id)
            return False
        ended = known - unfinished
        lost = ended - await self._store.existing_operations(run.id, sorted(ended))
        if lost:
            log.warning(
                "a worker has operations of %s that the log lacks: %s", run.id, sorted(lost)
            )
        return not lost

    async def catch_up(self, run: RunState, held: pb.HeldRun) -> Onward:
        """What a worker may lack that still has the run: the holes after it, and what is to be
        asked again before the outcomes of other runs take the place of the answers."""
        # Those of a private run are sent when each is prepared.
        planned = held.planned_seq if run.private is None else 0
        return await self._onward(run, held.last_seq, run.epoch, planned)

    async def _begin(
        self, run: RunState, worker: str
    ) -> tuple[RecoveryPoint, list[tuple[PendingOperation, TenSafeFault]]]:
        """The recovery point to begin at. Its state has no operation that has not ended: where only
        later ones are left, the samples before them are lost, and the run is not."""
        try:
            return await self.newest(run, before=run.open_seq, worker=worker), []
        except TenSafeFault as error:
            if error.detail.reason != "RUN_STATE_LOST":
                raise
            point = await self.newest(run, worker=worker)
        fault = TenSafeFault(
            "RUN_STATE_LOST",
            f"the weights that this sample of run {run.id} was to use cannot be rebuilt: no intact "
            f"snapshot before {point} is left. The run itself goes on; send the sample again",
            run_id=run.id,
        )
        waiting = [op for op in run.queue if (op.row.seq or 0) <= point.seq and not op.void]
        return point, [(operation, fault) for operation in waiting]

    async def _onward(self, run: RunState, after: int, epoch: int, at_least: int = 0) -> Onward:
        reached = max(run.reached_seq, min(at_least, run.next_seq - 1))
        waiting = [op for op in run.queue if (op.row.seq or 0) <= reached]
        specs = await self._specs(waiting)
        logged = [pair async for pair in self._logged(run, after, epoch, reached)]
        return Onward(reached, logged, specs)

    async def _specs(self, operations: Sequence[PendingOperation]) -> dict[str, bytes]:
        """Those that are there; an operation whose spec is gone cannot run."""
        places = await self._store.specs([op.row.id for op in operations]) if operations else {}
        specs = {}
        for operation_id, place in places.items():
            with suppress(BlobNotFoundError, DamagedPayloadError):
                specs[operation_id] = await self._payloads.load(*place)
        return specs

    async def settled(self, run: RunState) -> None:
        """Waits until outcomes that are on their way to the disk are there: their operations are
        not executed again, so that a replay must have them."""
        # Asked together: they may end together, and one that has ended answers nobody.
        await asyncio.gather(*(one.wait_finished() for one in run.in_flight if one.finishing))
        await self.flushed()

    async def flushed(self) -> None:
        """Waits until what was written so far is on disk.

        Raises:
            TenSafeFault: STORAGE_FULL, STORAGE_UNAVAILABLE.
        """
        await self._store.flushed()

    async def newest(
        self, run: RunState, before: int | None = None, worker: str = ""
    ) -> RecoveryPoint:
        """The newest intact recovery point from which the log reaches to the present, of those
        before a seq if one is given, and that a worker has not failed to load.

        Raises:
            TenSafeFault: RUN_STATE_LOST.
        """
        # What a private step has released is released once: nothing goes back before it.
        first = max(run.pruned_seq, run.released_seq)
        for point in await self._points(run, worker):
            if before is not None and point.seq >= before:
                continue
            if point.seq >= first and await self._is_intact(run, point):
                return point
        raise _lost(run, f"no intact snapshot or artifact is left from seq {first} on")

    async def oldest(self, run: RunState, worker: str) -> RecoveryPoint:
        """The first intact recovery point from which the log reaches to the present, of those that
        a worker has not failed to load.

        Raises:
            TenSafeFault: RUN_STATE_LOST.
        """
        for point in reversed(await self._points(run, worker)):
            if point.seq >= run.pruned_seq and await self._is_intact(run, point):
                return point
        raise _lost(run, f"no intact snapshot or artifact is left from seq {run.pruned_seq} on")

    async def history(
        self, run: RunState, after: int, epoch: int, end: int | None = None
    ) -> AsyncIterator[pb.PlannedOperation]:
        """Every settled operation after a seq that changed the run, in order, up to `end`.

        Raises:
            TenSafeFault: RUN_STATE_LOST.
        """
        end = settled_seq(run) if end is None else end
        async for _, planned in self._logged(run, after, epoch, end):
            yield planned

    async def _logged(
        self, run: RunState, after: int, epoch: int, end: int
    ) -> AsyncIterator[tuple[int, pb.PlannedOperation]]:
        private = run.private is not None
        units = await self._private.units(run) if private and after < end else {}
        while after < end:
            rows = await self._store.history(run.id, after, _PAGE)
            for row in rows:
                if (row.seq or 0) > end or not changed_state(row, private=private):
                    continue
                if private and _is_gradient(row) and row.id not in units:
                    continue  # its window was closed without an update
                planned = await self._planned(run, row, epoch)
                if row.id in units:
                    planned.units.CopyFrom(units[row.id])
                yield row.seq or 0, planned
            if len(rows) < _PAGE:
                break
            after = rows[-1].seq or end

    async def _points(self, run: RunState, worker: str) -> list[RecoveryPoint]:
        """All that may be of use to a worker, the newest first."""
        points = [RecoveryPoint(0)]
        if run.base_artifact_id:
            points.append(RecoveryPoint(run.base_seq, artifact_id=run.base_artifact_id))
        points += [
            RecoveryPoint(row.seq, snapshot=row)
            for row in await self._store.snapshots(run.id)
            if worker not in run.useless_snapshots.get(row.id, ())
        ]
        return sorted(points, key=lambda point: point.seq, reverse=True)

    async def _is_intact(self, run: RunState, point: RecoveryPoint) -> bool:
        """Whether a recovery can begin at a point. What is not there, or on a part of the disk that
        is broken, is passed over this time, and nothing of it is removed: a disk may come back.

        Raises:
            OSError: nothing can be read just now.
        """
        snapshot_id = point.snapshot.id if point.snapshot is not None else ""
        try:
            readable = await self._can_be_read(run, point)
            run.passed_over.discard(snapshot_id)
            return readable
        except BlobNotFoundError:
            why = "a part of it is missing"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            why = "it cannot be read"
        if snapshot_id:
            self._snapshots.damaged += 1
            run.passed_over.add(snapshot_id)
        log.error("%s of %s is not used: %s", point, run.id, why)
        return False

    async def _can_be_read(self, run: RunState, point: RecoveryPoint) -> bool:
        if point.snapshot is not None:
            if await self._snapshots.is_intact(point.snapshot):
                return True
            await self._snapshots.discard(run, point.snapshot, "it is damaged")
            return False
        if not point.artifact_id:
            return True
        artifact = await self._store.artifact(None, point.artifact_id)
        if artifact is not None and await self._snapshots.are_intact(
            f"artifacts/{artifact.id}", artifact.files
        ):
            return True
        log.error("%s of %s is not used: it is damaged or gone", point, run.id)
        return False

    async def _planned(self, run: RunState, row: OperationRow, epoch: int) -> pb.PlannedOperation:
        if is_void(row, private=run.private is not None):
            return pb.PlannedOperation(
                operation_id=row.id, epoch=epoch, spec=void_spec(row), void=True
            )
        if row.spec is None and row.spec_ref is None:
            raise _lost(run, f"what operation {row.id} was to do is no longer in the log")
        try:
            spec = await self._payloads.load(row.spec, row.spec_ref)
        except (BlobNotFoundError, DamagedPayloadError) as error:
            raise _lost(run, f"what operation {row.id} was to do is damaged or missing") from error
        return pb.PlannedOperation(
            operation_id=row.id,
            epoch=epoch,
            spec=spec,
            replay=True,
            failed=row.state != SUCCEEDED,
            artifact_id=row.artifact_id or "",
        )


def changed_state(row: OperationRow, *, private: bool = False) -> bool:
    """Whether a finished operation is part of how its run came to its state."""
    failed_step = row.kind == ops.OPERATION_KIND_OPTIM_STEP and row.executed
    return is_void(row, private=private) or (
        row.kind in _CHANGES_STATE and (row.state == SUCCEEDED or failed_step)
    )


def _is_gradient(row: OperationRow) -> bool:
    return row.kind == ops.OPERATION_KIND_FORWARD_BACKWARD and row.state == SUCCEEDED


def settled_seq(run: RunState) -> int:
    """The last seq of the run that is finished together with all before it."""
    # An outcome on its way to the disk counts: who reads the log waits for it (`settled`).
    open_ones = (operation for operation in run.in_flight if not operation.finishing)
    first = next(open_ones, run.queue[0] if run.queue else None)
    return (first.row.seq or 1) - 1 if first is not None else run.next_seq - 1


def _lost(run: RunState, why: str) -> TenSafeFault:
    newest = f"; artifact {run.base_artifact_id} may be" if run.base_artifact_id else ""
    return TenSafeFault(
        "RUN_STATE_LOST",
        f"the state of run {run.id} cannot be rebuilt: {why}. Restore the server's data directory "
        f"from a backup, or go on in a new run from an artifact{newest}",
        run_id=run.id,
    )
