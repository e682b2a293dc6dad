"""Takes uploads in: begun, filled, checked, and made artifacts of."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence

import numpy as np

from tensafe.v1 import artifacts_pb2 as pb
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobStore
from tensafe_server.events.translate import expires_at, timestamp
from tensafe_server.ids import new_id
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.artifacts import ArtifactBook, artifact_prefix
from tensafe_server.operations.checks import check_metadata
from tensafe_server.operations.validation import refused
from tensafe_server.store.base import Store, UploadRow
from tensafe_server.store.requests import first_request, new_request, uninterrupted
from tensafe_server.uploads import peft_folder
from tensafe_server.uploads.parts import Parts, check_sum, receive

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**30
MOST_OPEN = 16
GIVEN_UP_AFTER_S = 24 * 3600.0
_TIDY_EVERY_S = 6 * 3600.0
_NAMES = [peft_folder.CONFIG_FILE, peft_folder.WEIGHTS_FILE]
_NOT_FINITE = "has values that are NaN or infinite"


class UploadDesk:
    """Uploads of adapters."""

    def __init__(
        self, store: Store, blobs: BlobStore, models: ModelRegistry, artifacts: ArtifactBook
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._models = models
        self._artifacts = artifacts
        self._busy = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to give up what is not finished in time, and removes what crashes have left."""
        self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    def stop(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()

    async def _tidy(self) -> None:
        while True:
            try:
                async with self._busy:
                    await self._give_up_old(await self._store.open_uploads(None))
                    await self._remove_strays()
            except Exception:
                log.exception("uploads that were given up could not be removed; tried again later")
            await asyncio.sleep(_TIDY_EVERY_S)

    async def _remove_strays(self) -> None:
        kept = {row.id for row in await self._store.open_uploads(None)}
        stored = await asyncio.to_thread(lambda: list(self._blobs.sizes("uploads/")))
        for key, _ in stored:
            if key.split("/")[1] not in kept:
                await asyncio.to_thread(self._blobs.delete, key)

    async def begin(self, tenant_id: str, request: pb.BeginUploadRequest) -> pb.BeginUploadResponse:
        """Makes an upload, or tells how far the one with this request id has come.

        Raises:
            TenSafeFault: INVALID_ARGUMENT, MODEL_NOT_FOUND, QUEUE_FULL, REQUEST_ID_CONFLICT.
        """
        return await uninterrupted(self._begin(tenant_id, request))

    async def _begin(
        self, tenant_id: str, request: pb.BeginUploadRequest
    ) -> pb.BeginUploadResponse:
        async with self._busy:
            known = await first_request(self._store, tenant_id, request)
            row = await self._store.upload(tenant_id, known.subject) if known else None
            artifact = await self._finished(row)
            if row is None or (row.finished and artifact is None):
                _check_request(request)
                self._models.find(request.model_ref)
                rows = await self._store.open_uploads(tenant_id)
                if len(rows) - await self._give_up_old(rows) >= MOST_OPEN:
                    raise TenSafeFault(
                        "QUEUE_FULL",
                        f"{MOST_OPEN} uploads are open; finish them first. One that is not "
                        "finished within a day is given up",
                    )
                body = request.SerializeToString()
                now = time.time_ns()
                row = UploadRow(new_id("upl"), tenant_id, new_id("art"), body, now, False)
                await self._store.add_upload(row, new_request(tenant_id, request, row.id))
        if artifact is not None:
            return pb.BeginUploadResponse(upload_id=row.id, artifact=artifact)
        files = [
            pb.UploadedFile(name=name, received_bytes=await self._received(row, name))
            for name in _NAMES
        ]
        return pb.BeginUploadResponse(upload_id=row.id, files=files)

    async def receive(
        self, tenant_id: str, start: pb.UploadFileStart, chunks: AsyncIterator[pb.UploadFileRequest]
    ) -> int:
        """Stores one file's chunks; returns how many of its bytes are stored then.

        Raises:
            TenSafeFault: UPLOAD_NOT_FOUND, INVALID_ARGUMENT, CURSOR_OUT_OF_RANGE, STORAGE_FULL.
        """
        row = await self._open(tenant_id, start.upload_id)
        size = {file.name: file.size_bytes for file in _declared(row)}.get(start.name)
        if size is None:
            raise refused([("start.name", f"must be one of {', '.join(_NAMES)}")])
        return await receive(Parts(self._blobs, row.id, start.name), start, size, chunks)

    async def finish(self, tenant_id: str, request: pb.FinishUploadRequest) -> pb.Artifact:
        """Makes the artifact, or gives the one that was made.

        Raises:
            TenSafeFault: UPLOAD_NOT_FOUND, CHECKSUM_MISMATCH, or why the adapter is refused.
        """
        return await uninterrupted(self._finish_once(tenant_id, request))

    async def _finish_once(self, tenant_id: str, request: pb.FinishUploadRequest) -> pb.Artifact:
        first = await first_request(self._store, tenant_id, request) is None
        made = await self._finish(tenant_id, request.upload_id)
        if first:
            await self._store.remember(new_request(tenant_id, request, made.id))
        return made

    async def _finish(self, tenant_id: str, upload_id: str) -> pb.Artifact:
        async with self._busy:
            row = await self._store.upload(tenant_id, upload_id)
            artifact = await self._finished(row)
            if artifact is not None:
                return artifact
            row = await self._open(tenant_id, upload_id)
            for file in _declared(row):
                await asyncio.to_thread(check_sum, Parts(self._blobs, row.id, file.name), file)
            request = pb.BeginUploadRequest.FromString(row.body)
            model = self._models.find(request.model_ref)
            try:
                shape = await asyncio.to_thread(self._check_content, row, model)
            except TenSafeFault:
                await self._give_up(row)
                raise
            artifact = _artifact(row, request, model, shape)
            await asyncio.to_thread(self._put_together, row, artifact)
            await self._store.finish_upload(row.id, tenant_id, artifact)
            for file in artifact.files:
                await asyncio.to_thread(Parts(self._blobs, row.id, file.name).clear)
        self._artifacts.news()
        log.info("upload %s has become artifact %s", row.id, artifact.id)
        return artifact

    async def _open(self, tenant_id: str, upload_id: str) -> UploadRow:
        row = await self._store.upload(tenant_id, upload_id)
        if row is None or row.finished:
            raise TenSafeFault(
                "UPLOAD_NOT_FOUND",
                f"no open upload {upload_id!r}; begin again with `tensafe artifacts upload`",
                upload_id=upload_id,
            )
        return row

    async def _finished(self, row: UploadRow | None) -> pb.Artifact | None:
        """What an upload has become, if it is still there."""
        if row is None or not row.finished:
            return None
        artifact = await self._store.artifact(row.tenant_id, row.artifact_id)
        return None if artifact is None or artifact.HasField("deleted_at") else artifact

    async def _received(self, row: UploadRow, name: str) -> int:
        return await asyncio.to_thread(Parts(self._blobs, row.id, name).received_bytes)

    async def _give_up_old(self, rows: Sequence[UploadRow]) -> int:
        before = time.time_ns() - int(GIVEN_UP_AFTER_S * 1e9)
        old = [row for row in rows if row.created_ns < before]
        for row in old:
            await self._give_up(row)
        return len(old)

    async def _give_up(self, row: UploadRow) -> None:
        for name in _NAMES:
            await asyncio.to_thread(Parts(self._blobs, row.id, name).clear)
        await self._store.drop_upload(row.id)

    def _check_content(self, row: UploadRow, model: Model) -> pb.AdapterShape:
        config = b"".join(Parts(self._blobs, row.id, peft_folder.CONFIG_FILE).read())
        shape = peft_folder.read_config(config, model)
        [size] = [f.size_bytes for f in _declared(row) if f.name == peft_folder.WEIGHTS_FILE]
        weights = _Stream(Parts(self._blobs, row.id, peft_folder.WEIGHTS_FILE).read())
        header = weights.take(peft_folder.header_bytes(weights.take(8), size))
        peft_folder.check_header(header, size, shape, model)
        for name, dtype, count in peft_folder.tensors(header):
            _check_finite(name, dtype, weights, count)
        return shape

    def _put_together(self, row: UploadRow, artifact: pb.Artifact) -> None:
        for file in artifact.files:
            writer = self._blobs.writer(artifact_prefix(artifact.id) + file.name)
            try:
                for piece in Parts(self._blobs, row.id, file.name).read():
                    writer.write(piece)
                writer.commit()
            finally:
                writer.abort()


class _Stream:
    """Reads exact amounts from pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = bytearray()

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""
        while len(self._held) < count and (piece := next(self._pieces, b"")):
            self._held += piece
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


def _check_finite(name: str, dtype: str, weights: _Stream, count: int) -> None:
    item_bytes = peft_folder.ITEM_BYTES[dtype]
    while count:
        part = min(count, 2**18)
        data = weights.take(part * item_bytes)
        if dtype == "BF16":  # all bits of the exponent set
            finite = (np.frombuffer(data, "<u2") & 0x7F80) != 0x7F80
        else:
            finite = np.isfinite(np.frombuffer(data, f"<f{item_bytes}"))
        if not finite.all():
            raise refused([(f"{peft_folder.WEIGHTS_FILE}:{name}", _NOT_FINITE)])
        count -= part


def _declared(row: UploadRow) -> list[pb.ArtifactFile]:
    files = pb.BeginUploadRequest.FromString(row.body).files
    return sorted(files, key=lambda file: file.name)


def _check_request(request: pb.BeginUploadRequest) -> None:
    sizes = {file.name: file.size_bytes for file in request.files}
    if sorted(sizes) != _NAMES or len(request.files) != len(_NAMES):
        raise refused([("files", f"must be {' and '.join(_NAMES)}")])
    if sizes[peft_folder.CONFIG_FILE] > peft_folder.MOST_CONFIG_BYTES:
        raise refused([("files", f"{peft_folder.CONFIG_FILE} is larger than 1 MiB")])
    if math.fsum(sizes.values()) > MOST_BYTES:
        raise refused([("files", f"have more than {MOST_BYTES // 2**30} GiB in all")])
    check_metadata(request.metadata, "metadata")


def _artifact(
    row: UploadRow, request: pb.BeginUploadRequest, model: Model, shape: pb.AdapterShape
) -> pb.Artifact:
    files = _declared(row)
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    now = time.time_ns()
    artifact = pb.Artifact(
        id=row.artifact_id,
        model_ref=model.name if not model.accepts_any_reference else request.model_ref,
        size_bytes=sum(file.size_bytes for file in files),
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        metadata=request.metadata,
        created_at=timestamp(now),
        files=files,
        adapter=shape,
    )
    if request.HasField("ttl"):
        artifact.expires_at.CopyFrom(expires_at(now, request.ttl))
    return artifact
