"""Datasets for private runs: sent in chunks, resumable, checked on arrival."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc

from tensafe.v1 import artifacts_pb2
from tensafe.v1 import datasets_pb2 as pb
from tensafe_client.backoff import Backoff
from tensafe_client.checks import check_path, check_string
from tensafe_client.data.batches import encode_batch
from tensafe_client.data.datum import Datum
from tensafe_client.errors import BatchError, ChecksumMismatchError, from_rpc_error
from tensafe_client.privacy_report import DatasetInfo, PrivacyReport
from tensafe_client.session import Session, new_request_id
from tensafe_client.uploads import described, file_requests, goes_on

JSONL, BATCHES = "rows.jsonl", "rows.batches"
_ATTEMPTS_DAMAGED = 3
_CHECKED_BYTES_PER_S = 2e6
_DATUMS_AT_ONCE = 256


class Datasets:
    """Datasets of one session; coroutines of the I/O loop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def upload(self, source: Any, name: str | None) -> DatasetInfo:
        """Uploads token rows in JSONL, or datums.

        Raises:
            InvalidArgumentError: if there is no such file.
            InvalidDatasetError: naming the line that is malformed.
        """
        shown = "" if name is None else check_string("name", name)
        if isinstance(source, str | Path):
            return await self._upload_file(check_path("source", source), JSONL, shown)
        with tempfile.TemporaryDirectory(prefix="tensafe-dataset-") as directory:
            path = Path(directory, BATCHES)
            await asyncio.to_thread(_write, path, source)
            return await self._upload_file(path, BATCHES, shown)

    async def _upload_file(self, path: Path, file_name: str, name: str) -> DatasetInfo:
        file = await asyncio.to_thread(described, path, "source")
        file.name = file_name
        request = pb.BeginDatasetUploadRequest(name=name, file=file)
        digest = hashlib.sha256(request.SerializeToString(deterministic=True))
        request.request_id = f"upl-{digest.hexdigest()[:48]}"
        for attempt in range(1, _ATTEMPTS_DAMAGED + 1):
            upload = await self._sent(request, path)
            if upload.HasField("dataset"):
                return DatasetInfo.from_proto(upload.dataset)
            try:
                return await self._finished(upload.upload_id, file)
            except ChecksumMismatchError:  # the server has dropped the file; once more
                if attempt == _ATTEMPTS_DAMAGED:
                    raise
        raise AssertionError("unreachable")

    async def _sent(
        self, request: pb.BeginDatasetUploadRequest, path: Path
    ) -> pb.BeginDatasetUploadResponse:
        """Sends what has not arrived, again after a break as long as bytes still arrive."""
        backoff, loop, file = Backoff(), asyncio.get_running_loop(), request.file
        timeout_s = self._session.connection.timeout_s
        deadline, before = loop.time() + timeout_s, -1
        while True:
            stubs = await self._session.stubs()
            upload: pb.BeginDatasetUploadResponse = await self._session.call(
                stubs.datasets.BeginDatasetUpload, request
            )
            if upload.HasField("dataset") or upload.received_bytes >= file.size_bytes:
                return upload
            if upload.received_bytes > before:
                before = upload.received_bytes
                backoff.reset()
                deadline = loop.time() + timeout_s
            start = artifacts_pb2.UploadFileStart(
                upload_id=upload.upload_id, name=file.name, offset=upload.received_bytes
            )
            parts = file_requests(start, path, file.size_bytes)
            try:
                await stubs.datasets.UploadDatasetFile(
                    _wrapped(parts), metadata=self._session.metadata
                )
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
                if not goes_on(error, failure) or loop.time() > deadline:
                    raise failure from None
                await asyncio.sleep(backoff.next_s(failure.retry_delay_s))

    async def _finished(self, upload_id: str, file: artifacts_pb2.ArtifactFile) -> DatasetInfo:
        stubs = await self._session.stubs()
        request = pb.FinishDatasetUploadRequest(upload_id=upload_id, request_id=new_request_id())
        # The server reads all of it, twice.
        limit_s = self._session.connection.timeout_s + file.size_bytes / _CHECKED_BYTES_PER_S
        response = await self._session.call(
            stubs.datasets.FinishDatasetUpload, request, timeout_s=limit_s
        )
        return DatasetInfo.from_proto(response.dataset)

    async def get(self, dataset_id: str) -> DatasetInfo:
        """Reads a dataset's description."""
        stubs = await self._session.stubs()
        request = pb.GetDatasetRequest(dataset_id=check_string("dataset_id", dataset_id))
        response = await self._session.call(stubs.datasets.GetDataset, request)
        return DatasetInfo.from_proto(response.dataset)

    async def all(self) -> list[DatasetInfo]:
        """Lists the datasets, newest first."""
        stubs = await self._session.stubs()
        response = await self._session.call(stubs.datasets.ListDatasets, pb.ListDatasetsRequest())
        return [DatasetInfo.from_proto(one) for one in response.datasets]

    async def delete(self, dataset_id: str) -> None:
        """Deletes a dataset's content."""
        stubs = await self._session.stubs()
        request = pb.DeleteDatasetRequest(
            dataset_id=check_string("dataset_id", dataset_id), request_id=new_request_id()
        )
        await self._session.call(stubs.datasets.DeleteDataset, request)

    async def report(self, run_id: str) -> PrivacyReport:
        """Reads a run's privacy report."""
        from tensafe.v1 import privacy_pb2

        stubs = await self._session.stubs()
        request = privacy_pb2.GetPrivacyReportRequest(run_id=check_string("run_id", run_id))
        response = await self._session.call(stubs.privacy.GetPrivacyReport, request)
        return PrivacyReport.from_proto(response.report)


async def _wrapped(
    parts: AsyncIterator[artifacts_pb2.UploadFileRequest],
) -> AsyncIterator[pb.UploadDatasetFileRequest]:
    async for part in parts:
        yield pb.UploadDatasetFileRequest(part=part)


def _write(path: Path, datums: Iterable[Datum]) -> None:
    try:
        rows = iter(datums)
    except TypeError:
        raise BatchError.of(
            "source", f"must be a path to JSONL, or datums; got {type(datums).__name__}"
        ) from None
    with path.open("wb") as file:
        for batch in _some(rows):
            message = encode_batch(batch).message.SerializeToString()
            file.write(_varint(len(message)) + message)


def _some(rows: Iterator[Datum]) -> Iterator[list[Datum]]:
    while batch := list(islice(rows, _DATUMS_AT_ONCE)):
        yield batch


def _varint(number: int) -> bytes:
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])
