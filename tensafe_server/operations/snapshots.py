"""Recovery points of runs: taken in, found again, and checked before they are relied upon.

A snapshot is a handful of files and, written after them, a manifest with the SHA-256 of each. It
exists once its row is committed, and the row has the SHA-256 of the manifest: whatever a crash or a
bad disk leaves behind is either whole or not a snapshot.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from tensafe import failpoints
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe_server.blobs.base import BlobStore
from tensafe_server.ids import new_id
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation, RunState
from tensafe_server.store.base import SnapshotRow, Store

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = "tensafe-snapshot-1"
_CHUNK_BYTES = 2**20
_SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """How much a recovery may have to replay, and what is kept for it.

    A snapshot is made after an applied update, as soon as one of the first three has come together
    since the one before; 0: not by this measure.

    Attributes:
        snapshot_steps: applied updates.
        snapshot_bytes: bytes of the operations' specs.
        snapshot_replay_s: estimated time of a replay, s.
        snapshots_kept: how many of each run; 2 or more, so that a damaged one has one before it.
        result_retention_s: how long the big parts of results are kept, s.
    """

    snapshot_steps: int = 0
    snapshot_bytes: int = 64 * 2**20
    snapshot_replay_s: float = 20.0
    snapshots_kept: int = 2
    result_retention_s: float = 7 * 86_400.0

    def message(self) -> pb.SnapshotPolicy:
        """What workers are told of it."""
        return pb.SnapshotPolicy(
            steps=self.snapshot_steps,
            payload_bytes=self.snapshot_bytes,
            replay_s=self.snapshot_replay_s,
        )


def snapshot_key(snapshot_id: str, name: str) -> str:
    return f"snapshots/{snapshot_id}/{name}"


class SnapshotBook:
    """The snapshots of all runs.

    Attributes:
        on_kept: called with a run that has a new snapshot.
        damaged: how many snapshots were found damaged, or could not be loaded, since the start.
    """

    def __init__(self, store: Store, blobs: BlobStore, ledger: Ledger, kept: int) -> None:
        self._store = store
        self._blobs = blobs
        self._ledger = ledger
        self._kept = kept
        self._staged: dict[str, SnapshotRow] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.damaged = 0
        self.on_kept: Callable[[RunState], None] = lambda run: None

    async def load(self, open_charges: Container[str]) -> None:
        """Takes up what waits for its charge's commit, if the charge is open still."""
        for row in await self._store.staged_snapshots():
            self._staged[row.id] = row
            if row.charge_id not in open_charges:
                await self.remove([row])

    def refusal(self, header: pb.SnapshotHeader) -> str | None:
        """Why a worker's snapshot is not wanted now; None if it is."""
        run = self._ledger.runs.get(header.run_id)
        if run is None or run.deleted:
            return f"run {header.run_id} is gone"
        if run.epoch != header.epoch or run.worker_id != header.worker_id:
            return f"run {run.id} is no longer with {header.worker_id} under {header.epoch}"
        if run.restoring or header.seq <= run.snapshot_seq:
            return f"run {run.id} has one of seq {run.snapshot_seq}"
        if run.private is not None:
            step = run.by_seq.get(header.seq)
            if step is None or step.charge is None or step.charge.id != header.charge_id:
                return f"a snapshot of private run {run.id} is of the state after a charged step"
        return None

    async def keep(
        self, snapshot_id: str, header: pb.SnapshotHeader, files: Sequence[ArtifactFile]
    ) -> str | None:
        """Makes stored files a snapshot; returns None, or why not, and then the files are gone.

        It is a snapshot only once every operation that it contains has its outcome in the log: one
        that a lost worker has executed and nobody has heard of may yet end in another way. It
        contains nothing of a SAMPLE, so that it waits for none.
        """
        refusal: str | None = "it could not be stored"
        try:
            refusal = await self._keep(snapshot_id, header, files)
        finally:
            if refusal is not None:
                await self.remove_files(snapshot_id)
        return refusal

    async def _keep(
        self, snapshot_id: str, header: pb.SnapshotHeader, files: Sequence[ArtifactFile]
    ) -> str | None:
        run = self._ledger.runs[header.run_id]
        position = None
        if header.charge_id:
            charge = run.by_seq[header.seq].charge
            position = charge.reserved.position if charge is not None else None
        elif refusal := await self._settled(run, header):
            return refusal
        manifest = _manifest(snapshot_id, header, files, position)
        await asyncio.to_thread(self._blobs.put, snapshot_key(snapshot_id, MANIFEST), manifest)
        if refusal := self.refusal(header):
            return refusal
        row = SnapshotRow(
            id=snapshot_id,
            run_id=run.id,
            epoch=header.epoch,
            seq=header.seq,
            step=header.step,
            size_bytes=len(manifest) + sum(file.size_bytes for file in files),
            sha256=hashlib.sha256(manifest).hexdigest(),
            created_ns=time.time_ns(),
            charge_id=header.charge_id or None,
        )
        if header.charge_id:
            await self._store.add_snapshot(row)
            self._staged[row.id] = row
            failpoints.hit("after-private-snapshot")
            return None
        before, run.snapshot_seq = run.snapshot_seq, row.seq
        try:
            await self._store.add_snapshot(row)
        except BaseException:
            run.snapshot_seq = before
            raise
        log.info("snapshot %s of %s at seq %d, %d bytes", row.id, run.id, row.seq, row.size_bytes)
        self.on_kept(run)
        return None

    async def _settled(self, run: RunState, header: pb.SnapshotHeader) -> str | None:
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                while waiting := _contained(run, header.seq):
                    await waiting[0].wait_finished()
                    if refusal := self.refusal(header):
                        return refusal
        except TimeoutError:
            return f"operations up to seq {header.seq} are not settled"
        return None

    def staged(self, snapshot_id: str) -> SnapshotRow | None:
        """One that is on disk, and becomes a recovery point with its charge's commit."""
        return self._staged.get(snapshot_id)

    def confirm(self, run: RunState, snapshot_id: str) -> None:
        """The charge is committed under which it was made."""
        row = self._staged.pop(snapshot_id)
        run.snapshot_seq = row.seq
        log.info("snapshot %s of %s at seq %d, %d bytes", row.id, run.id, row.seq, row.size_bytes)
        self.on_kept(run)

    def drop_staged(self, charge_id: str) -> None:
        """Nothing will come of what was made under a charge."""
        rows = [row for row in self._staged.values() if row.charge_id == charge_id]
        if rows:
            task = asyncio.get_running_loop().create_task(self.remove(rows))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def files(self, row: SnapshotRow) -> list[ArtifactFile] | None:
        """A snapshot's files by its manifest; None if the manifest is damaged.

        Raises:
            BlobNotFoundError: it is not there. OSError: it cannot be read.
        """
        data = await asyncio.to_thread(self._blobs.get, snapshot_key(row.id, MANIFEST))
        if hashlib.sha256(data).hexdigest() != row.sha256:
            return None
        return [ArtifactFile(**file) for file in json.loads(data)["files"]]

    async def is_intact(self, row: SnapshotRow) -> bool:
        """Reads all of it, and compares the sums.

        Raises:
            BlobNotFoundError: a part of it is not there. OSError: it cannot be read.
        """
        files = await self.files(row)
        return files is not None and await self.are_intact(f"snapshots/{row.id}", files)

    async def are_intact(self, prefix: str, files: Sequence[ArtifactFile]) -> bool:
        """Whether stored files have the sums that were written down. Raises as `is_intact`."""
        return await asyncio.to_thread(self._sums_agree, prefix, files)

    async def retire(self, run: RunState) -> int:
        """Removes what no recovery will begin at: all but the newest ones, and the newest ones
        before the first operation that has not ended, which has to run again from there. One that
        a recovery passed over counts for none of them, and stays as long as an older one does.

        Returns:
            The seq before which no recovery begins any more; 0 while there are too few.
        """
        rows = await self._store.snapshots(run.id)
        if run.deleted:
            await self.remove(rows)
            return 0
        passed_over = run.passed_over.union(run.useless_snapshots)
        sound = [row for row in rows if row.id not in passed_over]
        before_open = [row for row in sound if row.seq < run.open_seq]
        kept = [*sound[: self._kept], *before_open[: self._kept]]
        oldest = min((row.seq for row in kept), default=0)
        if gone := [row for row in rows if row not in kept and (row in sound or row.seq < oldest)]:
            await self.remove(gone)
            for row in gone:
                run.useless_snapshots.pop(row.id, None)
        return before_open[self._kept - 1].seq if len(before_open) >= self._kept else 0

    async def discard(self, run: RunState, row: SnapshotRow, why: str) -> None:
        """Removes a snapshot that is of no use; the one before it takes its place."""
        self.damaged += 1
        log.error("snapshot %s of %s at seq %d is not used: %s", row.id, run.id, row.seq, why)
        await self.remove([row])
        run.snapshot_seq = max((one.seq for one in await self._store.snapshots(run.id)), default=0)

    async def remove(self, rows: Sequence[SnapshotRow]) -> None:
        """Rows first: what a crash leaves are files that nobody names, swept at the next start."""
        for row in rows:
            self._staged.pop(row.id, None)
        await self._store.remove_snapshots([row.id for row in rows])
        for row in rows:
            await self.remove_files(row.id)

    async def remove_files(self, snapshot_id: str) -> None:
        await asyncio.to_thread(self._delete, f"snapshots/{snapshot_id}/")

    def _delete(self, prefix: str) -> None:
        for key in [key for key, _ in self._blobs.sizes(prefix)]:
            self._blobs.delete(key)

    def _sums_agree(self, prefix: str, files: Sequence[ArtifactFile]) -> bool:
        for file in files:
            digest, size = hashlib.sha256(), 0
            for piece in self._blobs.read(f"{prefix}/{file.name}", 0, _CHUNK_BYTES):
                digest.update(piece)
                size += len(piece)
            if size != file.size_bytes or digest.hexdigest() != file.sha256:
                return False
        return True


def _contained(run: RunState, seq: int) -> list[PendingOperation]:
    """Operations that have not ended and that a state as of `seq` may have the effect of."""
    return [op for number, op in run.by_seq.items() if number <= seq and not op.is_sample]


def new_snapshot_id() -> str:
    return new_id("snap")


def _manifest(
    snapshot_id: str,
    header: pb.SnapshotHeader,
    files: Sequence[ArtifactFile],
    ledger_position: int | None,
) -> bytes:
    content = {
        "format": _FORMAT,
        "id": snapshot_id,
        "run_id": header.run_id,
        "epoch": header.epoch,
        "seq": header.seq,
        "step": header.step,
        "ledger_position": ledger_position,
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for file in files
        ],
    }
    return (json.dumps(content, indent=1) + "\n").encode()
