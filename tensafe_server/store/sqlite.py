"""The embedded store: SQLite in WAL mode, one group-committing writer, one reader connection."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from tensafe import failpoints
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.v1.models_pb2 import Model
from tensafe_server.store.artifacts import SqliteArtifacts, insert_artifacts
from tensafe_server.store.attempts import SqliteAttempts, end_attempts
from tensafe_server.store.base import (
    EventScope,
    Finish,
    KeyRow,
    OperationRow,
    Page,
    RequestRow,
    RunProgress,
    RunRow,
    TenantRow,
)
from tensafe_server.store.batched import insert_rows, update_rows
from tensafe_server.store.connection import connect, connect_and_recover
from tensafe_server.store.datasets import SqliteDatasets
from tensafe_server.store.migrations import migrate
from tensafe_server.store.privacy import SqlitePrivacy, write_ends
from tensafe_server.store.retention import SqliteRetention
from tensafe_server.store.tables import columns, row_values, where_clause
from tensafe_server.store.writer import GroupCommitWriter

log = logging.getLogger(__name__)


_OPERATION = columns(OperationRow)
_operation_values = attrgetter(*_OPERATION.split(", "))
_WITHOUT_SPEC = _OPERATION.replace(" spec,", " NULL,")
_INSERT_RUN = (
    f"INSERT INTO runs ({columns(RunRow)}) "  # noqa: S608 - names of our own fields
    f"VALUES ({', '.join('?' * len(fields(RunRow)))})"
)
_FINISHED = (
    "state, executed, artifact_id, result, result_ref, error, finished_ns, queue_ms, compute_ms, "
    "cursor, fingerprint, id"
)
_finished_values = attrgetter(*_FINISHED.split(", "))
_UPDATE_RUN = """
    UPDATE runs SET step = ?, base_artifact_id = ?, base_seq = ?,
      released_seq = MAX(released_seq, ?) WHERE id = ?"""
_MISSING_SEQS = """
    WITH RECURSIVE expected (seq) AS (
      SELECT 1 UNION ALL SELECT seq + 1 FROM expected WHERE seq < ?2
    ) SELECT seq FROM expected WHERE NOT EXISTS (
      SELECT 1 FROM operations o WHERE o.run_id = ?1 AND o.seq = expected.seq)"""
# Counted from each run's newest, every n-th. The bodies are read of those alone.
_COALESCED_METRICS = """
    WITH missed AS (
      SELECT cursor, COUNT(*) OVER (PARTITION BY run_id) - 1 AS last,
        ROW_NUMBER() OVER (PARTITION BY run_id ORDER BY cursor DESC) - 1 AS back
      FROM metrics WHERE {where} AND cursor > ? AND cursor <= ?
    ), every (nth) AS (SELECT (COUNT(*) + ? - 1) / ? FROM missed)
    SELECT body, MIN(nth - 1, last - back) FROM missed, every JOIN metrics USING (cursor)
    WHERE back % nth = 0 ORDER BY cursor"""


class SqliteStore(SqliteRetention, SqliteArtifacts, SqliteAttempts, SqlitePrivacy, SqliteDatasets):
    """A `Store` in one SQLite file.

    `synchronous=FULL`: what was answered survives a power cut, not only a crash of the process.
    """

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        writing = connect_and_recover(path)
        try:
            before, after = migrate(writing)
        except BaseException:
            writing.close()
            raise
        if 0 < before < after:
            log.info("brought the store %s from schema %d to %d", path, before, after)
        self._writer = GroupCommitWriter(writing, loop)
        self._write_connection = writing
        self._reading = connect(path)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._loop = loop

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Opens or creates the store.

        Raises:
            SchemaTooNewError: if a newer version of TenSafe wrote it.
        """
        return cls(path, asyncio.get_running_loop())

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.close)
        self._readers.shutdown()
        self._write_connection.close()
        self._reading.close()

    # Identity.

    async def tenants(self) -> list[TenantRow]:
        return await self._rows(TenantRow, "tenants ORDER BY name")

    async def keys(self) -> list[KeyRow]:
        return await self._rows(KeyRow, "keys ORDER BY created_ns")

    async def add_tenant(self, row: TenantRow, request: RequestRow | None = None) -> None:
        await self._add("INSERT INTO tenants VALUES (?, ?, ?)", row, request)

    async def add_key(self, row: KeyRow, request: RequestRow | None = None) -> None:
        await self._add("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", row, request)

    async def revoke_key(self, key_id: str, revoked_ns: int) -> None:
        await self._execute(
            "UPDATE keys SET revoked_ns = ? WHERE id = ? AND revoked_ns IS NULL",
            (revoked_ns, key_id),
        )

    # Idempotency.

    async def request(self, scope: str, request_id: str) -> RequestRow | None:
        return await self._one(
            RequestRow, "requests WHERE scope = ? AND request_id = ?", (scope, request_id)
        )

    async def remember(self, request: RequestRow) -> None:
        await self._execute(
            "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", row_values(request)
        )

    # Runs.

    async def add_run(self, row: RunRow, request: RequestRow | None = None) -> None:
        await self._add(_INSERT_RUN, row, request)

    async def runs(self) -> list[RunRow]:
        return await self._rows(RunRow, "runs ORDER BY created_ns")

    async def run_progress(self) -> dict[str, RunProgress]:
        def read(connection: sqlite3.Connection) -> dict[str, RunProgress]:
            progress = {}
            for run_id, count, newest, executed in connection.execute(
                "SELECT run_id, COUNT(*), MAX(seq), MAX(CASE WHEN executed THEN seq ELSE 0 END)"
                " FROM operations WHERE seq IS NOT NULL GROUP BY run_id"
            ).fetchall():
                gaps: list[int] = []
                if count != newest:
                    gaps = [seq for (seq,) in connection.execute(_MISSING_SEQS, (run_id, newest))]
                progress[run_id] = RunProgress(newest, gaps, executed)
            return progress

        return await self._read(read)

    async def set_run_status(self, run_id: str, status: int) -> None:
        await self._execute("UPDATE runs SET status = ? WHERE id = ?", (status, run_id))

    def set_run_epoch(self, run_id: str, epoch: int) -> asyncio.Future[None]:
        sql = "UPDATE runs SET epoch = ? WHERE id = ?"
        return self._write(sql, [(epoch, run_id)], insist=True)

    # The operation log.

    def add_operations(
        self,
        rows: Sequence[OperationRow],
        then: Callable[[], None] | None = None,
        *,
        insist: bool = False,
    ) -> asyncio.Future[None]:
        values = [_operation_values(row) for row in rows]

        def write(connection: sqlite3.Connection) -> None:
            insert_rows(connection, "operations", _OPERATION, values)
            failpoints.hit("before-commit")

        return self._writer.submit(write, then, insist=insist)

    def finish(
        self, finish: Finish, then: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        operations = [_finished_values(row) for row in finish.operations]
        metrics = [
            (item.cursor, tenant, item.run_id, item.SerializeToString())
            for tenant, item in finish.metrics
        ]
        artifacts = list(finish.artifacts)
        runs = [
            (row.step, row.base_artifact_id, row.base_seq, row.released_seq, row.run_id)
            for row in finish.runs
        ]
        attempted = list(finish.attempted)

        def write(connection: sqlite3.Connection) -> None:
            update_rows(connection, "operations", _FINISHED, operations)
            if metrics:
                connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", metrics)
            if artifacts:
                insert_artifacts(connection, artifacts)
            if runs:
                connection.executemany(_UPDATE_RUN, runs)
            if attempted:
                end_attempts(connection, attempted)
            write_ends(connection, finish.charges)
            connection.executemany(
                "UPDATE snapshots SET charge_id = NULL WHERE id = ?",
                [(snapshot_id,) for snapshot_id in finish.snapshots],
            )

        return self._writer.submit(write, then, insist=True)

    def end_deadlines(self, operation_ids: Sequence[str]) -> asyncio.Future[None]:
        """These have started, and no deadline concerns them any more."""
        sql = "UPDATE operations SET deadline_ns = NULL WHERE id = ?"
        return self._write(sql, [(one,) for one in operation_ids], insist=True)

    async def flushed(self) -> None:
        """Returns when everything written so far is on disk."""
        await self._writer.submit(lambda _: None)

    async def operation(self, tenant_id: str, operation_id: str) -> OperationRow | None:
        return await self._one(
            OperationRow, "operations WHERE tenant_id = ? AND id = ?", (tenant_id, operation_id)
        )

    async def operation_by_seq(self, run_id: str, seq: int) -> OperationRow | None:
        return await self._one(
            OperationRow, "operations WHERE run_id = ? AND seq = ?", (run_id, seq)
        )

    async def operation_by_request(self, tenant_id: str, request_id: str) -> OperationRow | None:
        return await self._one(
            OperationRow,
            "operations WHERE tenant_id = ? AND request_id = ?",
            (tenant_id, request_id),
        )

    async def operations(
        self, tenant_id: str, run_id: str | None, states: Sequence[int], page: Page
    ) -> list[tuple[int, OperationRow]]:
        where, values = where_clause(tenant_id=tenant_id, run_id=run_id)
        if states:
            where += f" AND state IN ({', '.join('?' * len(states))})"
            values += states
        return await self._page(OperationRow, "operations", where, values, page)

    async def existing_operations(self, run_id: str, ids: Sequence[str]) -> set[str]:
        """Those of the operations that are in the run's log."""
        places = ", ".join("?" * len(ids))
        rows = await self._select(
            f"SELECT id FROM operations WHERE run_id = ? AND id IN ({places})",  # noqa: S608
            (run_id, *ids),
        )
        return {operation_id for (operation_id,) in rows}

    async def unfinished(self) -> list[OperationRow]:
        """All that have not ended, without their specs, which together may fill the memory."""
        rows = await self._select(
            f"SELECT {_WITHOUT_SPEC} FROM operations WHERE state IN (1, 2) ORDER BY rowid"  # noqa: S608
        )
        return [OperationRow(*values) for values in rows]

    async def specs(
        self, operation_ids: Sequence[str]
    ) -> dict[str, tuple[bytes | None, str | None]]:
        places = ", ".join("?" * len(operation_ids))
        rows = await self._select(
            f"SELECT id, spec, spec_ref FROM operations WHERE id IN ({places})",  # noqa: S608
            operation_ids,
        )
        return {operation_id: (spec, reference) for operation_id, spec, reference in rows}

    async def history(
        self, run_id: str, after_seq: int, limit: int, *, with_specs: bool = True
    ) -> list[OperationRow]:
        """Finished operations of a run in order, from the seq after `after_seq`."""
        rows = await self._select(
            f"SELECT {_OPERATION if with_specs else _WITHOUT_SPEC} FROM operations"  # noqa: S608
            " WHERE run_id = ? AND seq > ? AND cursor IS NOT NULL ORDER BY seq LIMIT ?",
            (run_id, after_seq, limit),
        )
        return [OperationRow(*row) for row in rows]

    # Events.

    async def last_cursor(self) -> int:
        rows = await self._select(
            "SELECT MAX(COALESCE((SELECT MAX(cursor) FROM operations), 0),"
            " COALESCE((SELECT MAX(cursor) FROM metrics), 0))"
        )
        return int(rows[0][0])

    async def finished_operations(
        self, scope: EventScope, after: int, up_to: int, limit: int
    ) -> list[OperationRow]:
        """What has ended after a cursor, without specs."""
        where, values = where_clause(
            tenant_id=scope.tenant_id, run_id=scope.run_id, session_id=scope.session_id
        )
        rows = await self._select(
            f"SELECT {_WITHOUT_SPEC} FROM operations WHERE {where}"  # noqa: S608
            " AND cursor > ? AND cursor <= ? ORDER BY cursor LIMIT ?",
            (*values, after, up_to, limit),
        )
        return [OperationRow(*row) for row in rows]

    async def step_metrics(
        self, scope: EventScope, after: int, up_to: int, limit: int
    ) -> list[StepMetrics]:
        where, values = where_clause(tenant_id=scope.tenant_id, run_id=scope.run_id)
        rows = await self._select(
            f"SELECT body FROM metrics WHERE {where} AND cursor > ? AND cursor <= ?"  # noqa: S608
            " ORDER BY cursor LIMIT ?",
            (*values, after, up_to, limit),
        )
        return [StepMetrics.FromString(body) for (body,) in rows]

    async def coalesced_metrics(
        self, scope: EventScope, after: int, up_to: int, most: int
    ) -> list[StepMetrics]:
        where, values = where_clause(tenant_id=scope.tenant_id, run_id=scope.run_id)
        rows = await self._select(
            _COALESCED_METRICS.format(where=where), (*values, after, up_to, most, most)
        )
        found = []
        for body, skipped in rows:
            item = StepMetrics.FromString(body)
            item.skipped = skipped
            found.append(item)
        return found

    # Models.

    async def models(self) -> list[Model]:
        rows = await self._select("SELECT body FROM models ORDER BY name")
        return [Model.FromString(body) for (body,) in rows]

    async def put_model(self, model: Model) -> None:
        await self._execute(
            "INSERT OR REPLACE INTO models VALUES (?, ?)", (model.name, model.SerializeToString())
        )
