"""Datasets and their uploads in the SQLite store."""

from __future__ import annotations

import sqlite3

from tensafe.v1.datasets_pb2 import Dataset
from tensafe_server.store.base import DatasetUploadRow, RequestRow
from tensafe_server.store.tables import SqliteTables


class SqliteDatasets(SqliteTables):
    """What concerns datasets."""

    async def datasets(self) -> list[tuple[str, Dataset]]:
        """All that were ever there, with their tenants, oldest first."""
        rows = await self._select("SELECT tenant_id, body FROM datasets ORDER BY created_ns")
        return [(tenant_id, Dataset.FromString(body)) for tenant_id, body in rows]

    async def put_dataset(
        self, tenant_id: str, dataset: Dataset, upload_id: str | None = None
    ) -> None:
        """Adds or replaces a description, and notes what its upload has become."""
        deleted = dataset.deleted_at.ToNanoseconds() if dataset.HasField("deleted_at") else None
        values = (
            tenant_id,
            dataset.id,
            dataset.SerializeToString(),
            dataset.created_at.ToNanoseconds(),
            deleted,
        )

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO datasets VALUES (?, ?, ?, ?, ?)", values)
            connection.execute(
                "UPDATE dataset_uploads SET dataset_id = ? WHERE id = ?", (dataset.id, upload_id)
            )

        await self._writer.submit(write)

    async def add_dataset_upload(self, row: DatasetUploadRow, request: RequestRow) -> None:
        await self._add("INSERT INTO dataset_uploads VALUES (?, ?, ?, ?, ?)", row, request)

    async def dataset_upload(self, tenant_id: str, upload_id: str) -> DatasetUploadRow | None:
        return await self._one(
            DatasetUploadRow,
            "dataset_uploads WHERE tenant_id = ? AND id = ?",
            (tenant_id, upload_id),
        )

    async def open_dataset_uploads(self) -> list[DatasetUploadRow]:
        """Those of all tenants that have become nothing yet."""
        return await self._rows(DatasetUploadRow, "dataset_uploads WHERE dataset_id IS NULL")

    async def drop_dataset_upload(self, upload_id: str) -> None:
        await self._execute("DELETE FROM dataset_uploads WHERE id = ?", (upload_id,))
