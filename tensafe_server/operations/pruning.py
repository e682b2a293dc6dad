"""Taking away what nobody needs any more, so that the disk does not fill up for ever.

- Specs of operations before the oldest recovery point that is kept: a recovery never replays them.
  A sample that has not ended keeps those from which its weights can be had.
- Snapshots beyond those kept; all snapshots, specs and results of deleted runs.
- Big parts of results past their retention: per-token outputs and completions.
- At the start, blobs that no row names: a crash between blob and commit leaves such.

An operation's row stays, with its state, error and metrics.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tensafe.v1 import operations_pb2 as ops
from tensafe_server.blobs.base import BlobNotFoundError, BlobStore
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.store.base import OperationRow, Store

log = logging.getLogger(__name__)

_BATCH = 256
_LONGEST_PAUSE_S = 3600.0
_SWEPT = ("payloads/", "snapshots/", "artifacts/")


class Pruner:
    """Prunes after snapshots and deletions, and results by the clock."""

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        payloads: Payloads,
        ledger: Ledger,
        snapshots: SnapshotBook,
        result_retention_s: float,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._payloads = payloads
        self._ledger = ledger
        self._snapshots = snapshots
        self._retention_s = result_retention_s
        self._wanted: dict[str, RunState] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the clock, and looks at every run once."""
        self._timer = asyncio.get_running_loop().create_task(self._by_the_clock())
        for run in self._ledger.runs.values():
            if run.snapshot_seq or run.deleted:
                self.look_at(run)

    async def stop(self) -> None:
        """Ends between two steps; what is left is done after the next start."""
        for task in (self._timer, self._task):
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, (self._timer, self._task)), return_exceptions=True)

    def look_at(self, run: RunState) -> None:
        """Prunes a run soon: it has a new snapshot, or was deleted."""
        self._wanted[run.id] = run
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def prune(self, run: RunState) -> int:
        """Prunes a run, unless its past is being read; returns how many operations lost their
        specs."""
        async with run.pruning:
            return 0 if run.pinned else await self._prune(run)

    async def _prune(self, run: RunState) -> int:
        limit = await self._snapshots.retire(run)
        if run.deleted:
            await self._prune_results(time.time_ns(), run.id)
            limit = run.open_seq - 1
        pruned = 0
        while limit > run.pruned_seq:
            batch = await self._store.prune_specs(run.id, limit, _BATCH)
            # From the row on, nobody can want them.
            await self._payloads.delete(batch.blobs)
            pruned += batch.operations
            if not batch.more:
                run.pruned_seq = limit
                log.info("pruned %s up to seq %d", run.id, limit)
        return pruned

    async def sweep(self) -> int:
        """Removes blobs that no row names; returns how many. Call it before anything writes."""
        try:
            return await self._sweep()
        except OSError as error:
            log.warning("blobs without a row could not be removed: %s", error)
            return 0

    async def _sweep(self) -> int:
        partial = await asyncio.to_thread(self._blobs.sweep_partial)
        named = await self._store.blob_references()

        def orphans() -> list[str]:
            return [
                key
                for prefix in _SWEPT
                for key, _ in self._blobs.sizes(prefix)
                if key not in named and key.rpartition("/")[0] not in named
            ]

        found = await asyncio.to_thread(orphans)
        await self._payloads.delete(found)
        if found or partial:
            log.info("removed %d blobs without a row, %d unfinished", len(found), partial)
        return len(found) + partial

    async def prune_old_results(self) -> int:
        """Takes the big parts out of results past their retention; returns of how many."""
        return await self._prune_results(time.time_ns() - int(self._retention_s * 1e9), None)

    async def _prune_results(self, before_ns: int, run_id: str | None) -> int:
        pruned = away = 0
        while rows := await self._store.old_results(before_ns, run_id, _BATCH, away):
            left: dict[str, bytes | None] = {}
            for row in rows:
                try:
                    left[row.id] = await self._without_big_parts(row)
                except BlobNotFoundError:
                    if run_id is not None:
                        left[row.id] = None  # nobody asks for it any more
            away += len(rows) - len(left)
            await self._store.replace_results(list(left.items()))
            gone = [row.result_ref for row in rows if row.result_ref and row.id in left]
            await self._payloads.delete(gone)
            pruned += len(left)
        if away:
            log.warning("the files of %d old results are away; they wait for a later round", away)
        if pruned:
            log.info("pruned the results of %d operations", pruned)
        return pruned

    async def _without_big_parts(self, row: OperationRow) -> bytes | None:
        """What is left of a result. Raises BlobNotFoundError if its file is not there: the disk
        may come back."""
        try:
            data = await self._payloads.load(row.result, row.result_ref)
        except DamagedPayloadError:
            return None
        if not data:
            return None
        result = ops.OperationResult.FromString(data)
        for part in ("forward", "forward_backward"):
            if result.HasField(part):
                del getattr(result, part).outputs[:]
        if result.HasField("sample"):
            del result.sample.completions[:]
        return result.SerializeToString()

    async def _work(self) -> None:
        while self._wanted:
            _, run = self._wanted.popitem()
            try:
                await self.prune(run)
            except Exception:
                log.exception("pruning %s failed; it is tried again later", run.id)

    async def _by_the_clock(self) -> None:
        while True:
            for run in self._ledger.runs.values():
                if run.deleted:  # what still ran when it was deleted
                    self.look_at(run)
            try:
                await self.prune_old_results()
            except Exception:
                log.exception("pruning results failed; it is tried again later")
            await asyncio.sleep(min(_LONGEST_PAUSE_S, max(1.0, self._retention_s / 10)))
