"""Artifacts and uploads in the SQLite store."""

from __future__ import annotations

import sqlite3

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe_server.store.base import Page, RequestRow, UploadRow
from tensafe_server.store.tables import SqliteTables, before_row, columns, where_clause

_INSERT_UPLOAD = (
    f"INSERT INTO uploads ({columns(UploadRow)}) "  # noqa: S608 - names of our own fields
    "VALUES (?, ?, ?, ?, ?, ?)"
)
_INSERT_ARTIFACT = (
    "INSERT INTO artifacts (id, tenant_id, run_id, step, body, created_ns, expires_ns)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_READS = (
    f"({ops.OPERATION_KIND_LOAD_STATE}, {ops.OPERATION_KIND_SAMPLE}, "
    f"{ops.OPERATION_KIND_FORWARD}, {ops.OPERATION_KIND_FORWARD_BACKWARD})"
)
_REPLAYED = f"({ops.OPERATION_KIND_LOAD_STATE}, {ops.OPERATION_KIND_FORWARD_BACKWARD})"
_UNFINISHED = f"({ops.OPERATION_STATE_QUEUED}, {ops.OPERATION_STATE_RUNNING})"
# A replay may begin at any recovery point from which the log reaches on, and executes again what
# succeeded after it: loads, and gradients of losses that compare with an artifact.
_USES = f"""
    SELECT 'operation ' || id FROM operations
      WHERE artifact_id = ?1 AND kind IN {_READS} AND state IN {_UNFINISHED}
    UNION ALL SELECT 'run ' || id || ', whose recovery begins at it' FROM runs
      WHERE base_artifact_id = ?1 AND status != {training.RUN_STATUS_DELETED}
    UNION ALL SELECT 'run ' || r.id || ', whose recovery may load it again'
      FROM operations o JOIN runs r ON r.id = o.run_id
      WHERE o.artifact_id = ?1 AND o.kind IN {_REPLAYED}
        AND o.state = {ops.OPERATION_STATE_SUCCEEDED} AND o.seq > r.pruned_seq
        AND r.status != {training.RUN_STATUS_DELETED}
    LIMIT 1"""  # noqa: S608 - our own numbers


def insert_artifacts(connection: sqlite3.Connection, items: list[tuple[str, Artifact]]) -> None:
    """Adds (tenant id, artifact) rows inside a transaction."""
    connection.executemany(
        _INSERT_ARTIFACT,
        [
            (
                item.id,
                tenant,
                item.run_id,
                item.step,
                item.SerializeToString(),
                item.created_at.ToNanoseconds(),
                item.expires_at.ToNanoseconds() if item.HasField("expires_at") else None,
            )
            for tenant, item in items
        ],
    )


class SqliteArtifacts(SqliteTables):
    """What concerns artifacts."""

    async def artifact(self, tenant_id: str | None, artifact_id: str) -> Artifact | None:
        """Reads an artifact; `tenant_id` None is for workers, which serve every tenant."""
        where, values = where_clause(id=artifact_id, tenant_id=tenant_id)
        rows = await self._select(f"SELECT body FROM artifacts WHERE {where}", values)  # noqa: S608
        return Artifact.FromString(rows[0][0]) if rows else None

    async def artifact_at(self, run_id: str, step: int) -> Artifact | None:
        """The newest artifact of a run's step; one that is there before one that is gone."""
        rows = await self._select(
            "SELECT body FROM artifacts WHERE run_id = ? AND step = ?"
            " ORDER BY deleted_ns IS NOT NULL, expires_ns IS NOT NULL, created_ns DESC LIMIT 1",
            (run_id, step),
        )
        return Artifact.FromString(rows[0][0]) if rows else None

    async def artifacts(
        self, tenant_id: str, run_id: str | None, page: Page, now_ns: int
    ) -> list[tuple[int, Artifact]]:
        """A page of those that are there."""
        where, values = where_clause(tenant_id=tenant_id, run_id=run_id)
        rows = await self._select(
            f"SELECT rowid, body FROM artifacts WHERE {where} AND rowid < ?"  # noqa: S608
            " AND deleted_ns IS NULL AND (expires_ns IS NULL OR expires_ns > ?)"
            " ORDER BY rowid DESC LIMIT ?",
            (*values, before_row(page), now_ns, page.size),
        )
        return [(row, Artifact.FromString(body)) for row, body in rows]

    async def artifact_use(self, artifact_id: str) -> str | None:
        """What still needs an artifact, in words; None if nothing does."""
        await self._writer.submit(lambda _: None)
        rows = await self._select(_USES, (artifact_id,))
        return str(rows[0][0]) if rows else None

    async def delete_artifact(self, artifact: Artifact) -> None:
        """Marks it by its `deleted_at`; its files are still to be removed."""
        await self._execute(
            "UPDATE artifacts SET body = ?, deleted_ns = ? WHERE id = ?",
            (artifact.SerializeToString(), artifact.deleted_at.ToNanoseconds(), artifact.id),
        )

    async def artifacts_to_remove(self) -> list[str]:
        rows = await self._select(
            "SELECT id FROM artifacts WHERE deleted_ns IS NOT NULL AND removed_ns IS NULL"
        )
        return [artifact_id for (artifact_id,) in rows]

    async def artifact_removed(self, artifact_id: str) -> None:
        """Notes that its files are gone."""
        await self._execute(
            "UPDATE artifacts SET removed_ns = deleted_ns WHERE id = ?", (artifact_id,)
        )

    async def expired_artifacts(self, now_ns: int) -> list[Artifact]:
        """Those whose time is over and that are not marked yet."""
        rows = await self._select(
            "SELECT body FROM artifacts WHERE deleted_ns IS NULL AND expires_ns <= ?", (now_ns,)
        )
        return [Artifact.FromString(body) for (body,) in rows]

    async def next_expiry(self, after_ns: int) -> int | None:
        """When the next artifact's time is over, nanoseconds since 1970."""
        rows = await self._select(
            "SELECT MIN(expires_ns) FROM artifacts WHERE deleted_ns IS NULL AND expires_ns > ?",
            (after_ns,),
        )
        return None if rows[0][0] is None else int(rows[0][0])

    # Uploads.

    async def add_upload(self, row: UploadRow, request: RequestRow) -> None:
        await self._add(_INSERT_UPLOAD, row, request)

    async def upload(self, tenant_id: str, upload_id: str) -> UploadRow | None:
        return await self._one(
            UploadRow, "uploads WHERE tenant_id = ? AND id = ?", (tenant_id, upload_id)
        )

    async def open_uploads(self, tenant_id: str | None) -> list[UploadRow]:
        """Those of one tenant, or of all."""
        where, values = where_clause(tenant_id=tenant_id)
        condition = f"{where} AND NOT finished" if where else "NOT finished"
        return await self._rows(UploadRow, f"uploads WHERE {condition}", values)

    async def finish_upload(self, upload_id: str, tenant_id: str, artifact: Artifact) -> None:
        """Adds what it has become, and notes that it has."""

        def write(connection: sqlite3.Connection) -> None:
            insert_artifacts(connection, [(tenant_id, artifact)])
            connection.execute("UPDATE uploads SET finished = 1 WHERE id = ?", (upload_id,))

        await self._writer.submit(write)

    async def drop_upload(self, upload_id: str) -> None:
        await self._execute("DELETE FROM uploads WHERE id = ?", (upload_id,))
