"""Recovery points in the SQLite store, and taking out of it what nobody needs any more."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence

from tensafe_server.store.base import OperationRow, Pruned, SnapshotRow, StoreUse
from tensafe_server.store.tables import SqliteTables, columns, row_values

_INSERT_SNAPSHOT = (
    f"INSERT INTO snapshots ({columns(SnapshotRow)}) "  # noqa: S608 - names of our own fields
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_WITH_SPEC = """
    SELECT id, seq, spec_ref FROM operations WHERE run_id = ?
      AND seq > (SELECT pruned_seq FROM runs WHERE id = ?1) AND seq <= ? AND cursor IS NOT NULL
    ORDER BY seq LIMIT ?"""
_OLD_RESULTS = """operations WHERE result_pruned = 0 AND kind IN (1, 2, 4)
    AND finished_ns < ? AND (? IS NULL OR run_id = ?2) ORDER BY finished_ns, rowid
    LIMIT ? OFFSET ?"""
_REFERENCES = """
    SELECT spec_ref FROM operations WHERE spec_ref IS NOT NULL
    UNION SELECT result_ref FROM operations WHERE result_ref IS NOT NULL
    UNION SELECT 'snapshots/' || id FROM snapshots
    UNION SELECT 'artifacts/' || id FROM artifacts
    UNION SELECT 'uploads/' || id FROM uploads WHERE NOT finished
    UNION SELECT 'artifacts/' || artifact_id FROM uploads WHERE NOT finished
    UNION SELECT 'artifacts/' || artifact_id FROM operations
      WHERE state IN (1, 2) AND artifact_id IS NOT NULL"""


class SqliteRetention(SqliteTables):
    """What concerns snapshots and pruning."""

    def add_snapshot(self, row: SnapshotRow) -> asyncio.Future[None]:
        return self._write(_INSERT_SNAPSHOT, [row_values(row)])

    async def snapshot(self, snapshot_id: str) -> SnapshotRow | None:
        return await self._one(
            SnapshotRow, "snapshots WHERE id = ? AND charge_id IS NULL", (snapshot_id,)
        )

    async def snapshots(self, run_id: str) -> list[SnapshotRow]:
        """A run's snapshots, newest first."""
        return await self._rows(
            SnapshotRow,
            "snapshots WHERE run_id = ? AND charge_id IS NULL ORDER BY seq DESC, created_ns DESC",
            (run_id,),
        )

    async def staged_snapshots(self) -> list[SnapshotRow]:
        """Those that wait for their charge's commit."""
        return await self._rows(SnapshotRow, "snapshots WHERE charge_id IS NOT NULL")

    async def newest_snapshots(self) -> dict[str, int]:
        """Run id → seq of its newest snapshot."""
        return dict(
            await self._select(
                "SELECT run_id, MAX(seq) FROM snapshots WHERE charge_id IS NULL GROUP BY run_id"
            )
        )

    async def remove_snapshots(self, ids: Sequence[str]) -> None:
        await self._write("DELETE FROM snapshots WHERE id = ?", [(one,) for one in ids])

    async def count_mismatch(self, run_id: str) -> None:
        await self._execute(
            "UPDATE runs SET replay_mismatches = replay_mismatches + 1 WHERE id = ?", (run_id,)
        )

    async def prune_specs(self, run_id: str, up_to_seq: int, limit: int) -> Pruned:
        """Takes out the specs of finished operations up to a seq, the oldest `limit` of them."""
        found: list[tuple[str, int, str | None]] = []

        def write(connection: sqlite3.Connection) -> None:
            found[:] = connection.execute(_WITH_SPEC, (run_id, up_to_seq, limit)).fetchall()
            reached = found[-1][1] if len(found) == limit else up_to_seq
            connection.executemany(
                "UPDATE operations SET spec = NULL, spec_ref = NULL WHERE id = ?",
                [(operation_id,) for operation_id, _, _ in found],
            )
            connection.execute(
                "UPDATE runs SET pruned_seq = MAX(pruned_seq, ?) WHERE id = ?", (reached, run_id)
            )

        await self._writer.submit(write)
        return Pruned([ref for _, _, ref in found if ref], len(found), len(found) == limit)

    async def old_results(
        self, before_ns: int, run_id: str | None, limit: int, skip: int = 0
    ) -> list[OperationRow]:
        """Operations whose results may have big parts, finished before then; the oldest first,
        without the first `skip` of them."""
        return await self._rows(OperationRow, _OLD_RESULTS, (before_ns, run_id, limit, skip))

    async def replace_results(self, rows: Sequence[tuple[str, bytes | None]]) -> None:
        """Puts what is left of results, (operation id, result), in place of them."""
        await self._write(
            "UPDATE operations SET result = ?, result_ref = NULL, result_pruned = 1 WHERE id = ?",
            [(result, operation_id) for operation_id, result in rows],
        )

    async def blob_references(self) -> set[str]:
        """Keys of blobs that rows name, and the prefixes of snapshots and artifacts that are, or
        may come to be."""
        return {key for (key,) in await self._select(_REFERENCES)}

    async def use(self) -> StoreUse:
        [(pages, page_bytes, free)] = await self._select(
            "SELECT page_count, page_size, freelist_count"
            " FROM pragma_page_count(), pragma_page_size(), pragma_freelist_count()"
        )
        [counts] = await self._select(
            "SELECT (SELECT COUNT(*) FROM operations), (SELECT COUNT(*) FROM snapshots),"
            " (SELECT COUNT(*) FROM artifacts WHERE deleted_ns IS NULL)"
        )
        return StoreUse(pages * page_bytes, free * page_bytes, *counts)
