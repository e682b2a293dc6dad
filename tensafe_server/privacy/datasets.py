"""Datasets: uploaded, kept in their tenant's own folder, drawn from, deleted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from tensafe.v1 import artifacts_pb2
from tensafe.v1 import datasets_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobStore
from tensafe_server.events.translate import timestamp
from tensafe_server.ids import new_id
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.validation import refused
from tensafe_server.privacy.layout import DatasetFiles, survey
from tensafe_server.privacy.rows import BATCHES, JSONL, Row, read_rows
from tensafe_server.store.base import DatasetUploadRow, Store
from tensafe_server.store.requests import first_request, new_request, uninterrupted
from tensafe_server.uploads.parts import Parts, check_sum, receive

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**30
MOST_OPEN = 16
GIVEN_UP_AFTER_S = 24 * 3600.0
FOLDER = "dataset-uploads"


class DatasetDesk:
    """Takes datasets in, and knows those that are there."""

    def __init__(self, store: Store, blobs: BlobStore, ledger: Ledger) -> None:
        self._store = store
        self._blobs = blobs
        self._ledger = ledger
        self._datasets: dict[tuple[str, str], pb.Dataset] = {}
        self._kept: Counter[tuple[str, str]] = Counter()
        self._going: set[tuple[str, str]] = set()
        self._busy = asyncio.Lock()

    async def load(self) -> None:
        """Reads which are there, and removes what crashes have left."""
        for tenant_id, dataset in await self._store.datasets():
            self._datasets[tenant_id, dataset.id] = dataset
        await self._give_up_old()
        await asyncio.to_thread(self._remove_strays, await self._store.open_dataset_uploads())

    def find(self, tenant_id: str, dataset_id: str) -> pb.Dataset:
        """Raises TenSafeFault DATASET_NOT_FOUND."""
        key = tenant_id, dataset_id
        dataset = self._datasets.get(key)
        if dataset is None or dataset.HasField("deleted_at") or key in self._going:
            raise TenSafeFault(
                "DATASET_NOT_FOUND",
                f"no dataset {dataset_id!r}; `tensafe datasets list` shows yours, and `tensafe "
                "datasets upload` adds one",
                dataset_id=dataset_id,
            )
        return dataset

    @contextmanager
    def kept(self, tenant_id: str, dataset_id: str) -> Iterator[None]:
        """While a run comes into being that draws from it, nobody deletes it.

        Raises:
            TenSafeFault: DATASET_NOT_FOUND.
        """
        self.find(tenant_id, dataset_id)
        self._kept[tenant_id, dataset_id] += 1
        try:
            yield
        finally:
            self._kept[tenant_id, dataset_id] -= 1

    def known(self, tenant_id: str, dataset_id: str) -> pb.Dataset | None:
        """One that is or was there."""
        return self._datasets.get((tenant_id, dataset_id))

    def all_of(self, tenant_id: str) -> list[pb.Dataset]:
        """A tenant's, newest first."""
        mine = [one for (tenant, _), one in self._datasets.items() if tenant == tenant_id]
        there = [one for one in mine if not one.HasField("deleted_at")]
        return sorted(there, key=lambda one: one.created_at.ToNanoseconds(), reverse=True)

    async def begin(
        self, tenant_id: str, request: pb.BeginDatasetUploadRequest
    ) -> pb.BeginDatasetUploadResponse:
        """Makes an upload, or tells how far the one with this request id has come.

        Raises:
            TenSafeFault: INVALID_ARGUMENT, QUEUE_FULL, REQUEST_ID_CONFLICT.
        """
        return await uninterrupted(self._begin(tenant_id, request))

    async def _begin(
        self, tenant_id: str, request: pb.BeginDatasetUploadRequest
    ) -> pb.BeginDatasetUploadResponse:
        async with self._busy:
            known = await first_request(self._store, tenant_id, request)
            row = await self._store.dataset_upload(tenant_id, known.subject) if known else None
            made = self._datasets.get((tenant_id, row.dataset_id or "")) if row else None
            if made is not None and not made.HasField("deleted_at"):
                return pb.BeginDatasetUploadResponse(upload_id=row.id if row else "", dataset=made)
            if row is None or row.dataset_id is not None:
                row = await self._new(tenant_id, request)
        received = await asyncio.to_thread(self._parts(row).received_bytes)
        return pb.BeginDatasetUploadResponse(upload_id=row.id, received_bytes=received)

    async def _new(self, tenant_id: str, request: pb.BeginDatasetUploadRequest) -> DatasetUploadRow:
        if request.file.name not in (JSONL, BATCHES):
            raise refused([("file.name", f"must be {JSONL} or {BATCHES}")])
        if not 0 < request.file.size_bytes <= MOST_BYTES:
            raise refused([("file.size_bytes", f"must be from 1 to {MOST_BYTES}")])
        await self._give_up_old()
        rows = await self._store.open_dataset_uploads()
        if sum(row.tenant_id == tenant_id for row in rows) >= MOST_OPEN:
            raise TenSafeFault(
                "QUEUE_FULL",
                f"{MOST_OPEN} uploads are open; finish them first. One that is not finished within "
                "a day is given up",
            )
        body = request.SerializeToString()
        row = DatasetUploadRow(new_id("upl"), tenant_id, body, time.time_ns())
        await self._store.add_dataset_upload(row, new_request(tenant_id, request, row.id))
        return row

    async def receive(
        self,
        tenant_id: str,
        start: artifacts_pb2.UploadFileStart,
        chunks: AsyncIterator[artifacts_pb2.UploadFileRequest],
    ) -> int:
        """Stores chunks; returns how many of the file's bytes are stored then.

        Raises:
            TenSafeFault: UPLOAD_NOT_FOUND, INVALID_ARGUMENT, CURSOR_OUT_OF_RANGE, STORAGE_FULL.
        """
        row = await self._open(tenant_id, start.upload_id)
        file = _declared(row)
        if start.name != file.name:
            raise refused([("start.name", f"must be {file.name}")])
        return await receive(self._parts(row), start, file.size_bytes, chunks)

    async def finish(self, tenant_id: str, request: pb.FinishDatasetUploadRequest) -> pb.Dataset:
        """Makes the dataset, or gives the one that was made.

        Raises:
            TenSafeFault: UPLOAD_NOT_FOUND, CHECKSUM_MISMATCH, INVALID_DATASET.
        """
        return await uninterrupted(self._finish_once(tenant_id, request))

    async def _finish_once(
        self, tenant_id: str, request: pb.FinishDatasetUploadRequest
    ) -> pb.Dataset:
        first = await first_request(self._store, tenant_id, request) is None
        made = await self._finish(tenant_id, request.upload_id)
        if first:
            await self._store.remember(new_request(tenant_id, request, made.id))
        return made

    async def _finish(self, tenant_id: str, upload_id: str) -> pb.Dataset:
        async with self._busy:
            row = await self._store.dataset_upload(tenant_id, upload_id)
            if row is not None and row.dataset_id is not None:
                return self.find(tenant_id, row.dataset_id)
            row = await self._open(tenant_id, upload_id)
            parts = self._parts(row)
            await asyncio.to_thread(check_sum, parts, _declared(row))
            try:
                dataset = await asyncio.to_thread(self._lay_out, row, parts)
            except TenSafeFault as fault:
                if fault.detail.reason == "INVALID_DATASET":
                    await self._give_up(row)
                raise
            await self._store.put_dataset(tenant_id, dataset, row.id)
            self._datasets[tenant_id, dataset.id] = dataset
            await asyncio.to_thread(parts.clear)
        log.info("upload %s has become dataset %s", row.id, dataset.id)
        return dataset

    def _lay_out(self, row: DatasetUploadRow, parts: Parts) -> pb.Dataset:
        request = pb.BeginDatasetUploadRequest.FromString(row.body)

        def rows() -> Iterator[Row]:
            return read_rows(request.file.name, parts.read())

        found = survey(rows())
        dataset = found.dataset
        there = self._datasets.get((row.tenant_id, dataset.id))
        if there is not None and not there.HasField("deleted_at"):
            return there
        files = DatasetFiles(self._blobs, row.tenant_id, dataset.id)
        dataset.size_bytes = files.write(rows(), found)
        dataset.name = request.name
        dataset.created_at.CopyFrom(timestamp(time.time_ns()))
        return dataset

    async def delete(self, tenant_id: str, request: pb.DeleteDatasetRequest) -> pb.Dataset:
        """Deletes a dataset's content; one that is gone already is no error.

        Raises:
            TenSafeFault: DATASET_NOT_FOUND, DATASET_IN_USE, REQUEST_ID_CONFLICT.
        """
        return await uninterrupted(self._delete(tenant_id, request))

    async def _delete(self, tenant_id: str, request: pb.DeleteDatasetRequest) -> pb.Dataset:
        async with self._busy:
            known = await first_request(self._store, tenant_id, request)
            if known is not None:
                return self._datasets[tenant_id, request.dataset_id]
            there = self.known(tenant_id, request.dataset_id)
            dataset = pb.Dataset()
            dataset.CopyFrom(there or self.find(tenant_id, request.dataset_id))
            self._check_unused(tenant_id, dataset.id)
            if not dataset.HasField("deleted_at"):
                await self._remove(tenant_id, dataset)
            await self._store.remember(new_request(tenant_id, request, dataset.id))
        return dataset

    def _check_unused(self, tenant_id: str, dataset_id: str) -> None:
        for run in self._ledger.runs.values():
            draws = run.private is not None and run.private.server_poisson
            mine = run.tenant_id == tenant_id and not run.deleted
            if mine and draws and run.config.dp.dataset_id == dataset_id:
                raise TenSafeFault(
                    "DATASET_IN_USE",
                    f"run {run.id} draws from dataset {dataset_id}; delete the run first",
                    dataset_id=dataset_id,
                    run_id=run.id,
                )
        if self._kept[tenant_id, dataset_id]:
            raise TenSafeFault(
                "DATASET_IN_USE",
                f"a run that draws from dataset {dataset_id} is being created at this moment",
                dataset_id=dataset_id,
            )

    async def _remove(self, tenant_id: str, dataset: pb.Dataset) -> None:
        key = tenant_id, dataset.id
        self._going.add(key)  # before anything is waited for: no run begins to draw from it now
        try:
            dataset.deleted_at.CopyFrom(timestamp(time.time_ns()))
            await self._store.put_dataset(tenant_id, dataset)
            self._datasets[key] = dataset
            files = DatasetFiles(self._blobs, tenant_id, dataset.id)
            await asyncio.to_thread(files.delete)
        finally:
            self._going.discard(key)

    async def _open(self, tenant_id: str, upload_id: str) -> DatasetUploadRow:
        row = await self._store.dataset_upload(tenant_id, upload_id)
        if row is None or row.dataset_id is not None:
            raise TenSafeFault(
                "UPLOAD_NOT_FOUND",
                f"no open upload {upload_id!r}; begin again with `tensafe datasets upload`",
                upload_id=upload_id,
            )
        return row

    def _parts(self, row: DatasetUploadRow) -> Parts:
        return Parts(self._blobs, row.id, _declared(row).name, FOLDER)

    async def _give_up_old(self) -> None:
        before = time.time_ns() - int(GIVEN_UP_AFTER_S * 1e9)
        for row in await self._store.open_dataset_uploads():
            if row.created_ns < before:
                await self._give_up(row)

    async def _give_up(self, row: DatasetUploadRow) -> None:
        await asyncio.to_thread(self._parts(row).clear)
        await self._store.drop_dataset_upload(row.id)

    def _remove_strays(self, open_ones: list[DatasetUploadRow]) -> None:
        """Parts of no upload, and files of no dataset."""
        uploads = {row.id for row in open_ones}
        there = {key for key, one in self._datasets.items() if not one.HasField("deleted_at")}
        for key, _ in list(self._blobs.sizes(f"{FOLDER}/")):
            if key.split("/")[1] not in uploads:
                self._blobs.delete(key)
        for key, _ in list(self._blobs.sizes("datasets/")):
            _, tenant_id, dataset_id, _ = key.split("/")
            if (tenant_id, dataset_id) not in there:
                self._blobs.delete(key)


def _declared(row: DatasetUploadRow) -> artifacts_pb2.ArtifactFile:
    return pb.BeginDatasetUploadRequest.FromString(row.body).file
