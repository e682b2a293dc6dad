"""WorkerService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from tensafe import failpoints
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1 import worker_pb2_grpc as rpc
from tensafe.wire.status import TenSafeFault
from tensafe_server.api.files import ArtifactUpload, artifact_chunks, snapshot_chunks
from tensafe_server.blobs.base import BlobNotFoundError, BlobStore
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.reception import Reception
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.snapshots import SnapshotBook, new_snapshot_id
from tensafe_server.operations.validation import check_rules, refused
from tensafe_server.privacy.draws import Draws
from tensafe_server.store.base import Store
from tensafe_server.store.requests import uninterrupted


class WorkerServicer(rpc.WorkerServiceServicer):
    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        models: ModelRegistry,
        reception: Reception,
        snapshots: SnapshotBook,
        draws: Draws,
    ) -> None:
        self._draws = draws
        self._store = store
        self._blobs = blobs
        self._models = models
        self._reception = reception
        self._snapshots = snapshots

    async def PublishModel(
        self, request: pb.PublishModelRequest, context: Any
    ) -> pb.PublishModelResponse:
        files = {file.name: file.data for file in request.tokenizer_files}
        await self._models.publish(request.model, files)
        return pb.PublishModelResponse()

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> AsyncIterator[pb.ConnectResponse]:
        first = await anext(requests, None)
        if first is None or not first.HasField("register"):
            raise refused([("register", "must be the stream's first message")])
        check_rules(first)
        link = await self._reception.arrive(first.register)
        reader = asyncio.create_task(self._read(link, requests))
        try:
            while messages := await link.next_messages():
                for message in messages:
                    yield message
                    if message.HasField("plan"):
                        failpoints.hit("after-dispatch")
            if reader.done():
                reader.result()
            if link.ended_by is not None:
                raise link.ended_by
        finally:
            reader.cancel()
            await asyncio.shield(asyncio.ensure_future(self._reception.leave(link)))

    async def _read(self, link: WorkerLink, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        try:
            async for request in requests:
                link.heard()
                link.receiving = True
                await self._take(link, request)
                link.receiving = False
        finally:
            link.close()

    async def _take(self, link: WorkerLink, request: pb.ConnectRequest) -> None:
        if request.HasField("report"):
            # To its end, also if the stream breaks: what is half taken in nobody else would end.
            await uninterrupted(self._reception.report(link, request.report))
        elif request.HasField("heartbeat"):
            self._reception.heartbeat(link, request.heartbeat)
        elif request.HasField("goodbye"):
            self._reception.goodbye(link)
        else:
            raise refused([("message", "must be a report, a heartbeat or a goodbye")])

    async def UploadArtifact(
        self, requests: AsyncIterator[pb.UploadArtifactRequest], context: Any
    ) -> pb.UploadArtifactResponse:
        first = await anext(requests, None)
        if first is None or not first.artifact_id:
            raise refused([("artifact_id", "must be the stream's first message")])
        upload = ArtifactUpload(self._blobs, first.artifact_id)
        check_current = self._reception.upload_fence(first.artifact_id, first.epoch)
        try:
            async for request in requests:
                check_rules(request)
                check_current()
                await upload.take(request.chunk)
            files = upload.files(first.file_count)
        finally:
            upload.abort()
        check_current()
        self._reception.stored(first.artifact_id, files)
        return pb.UploadArtifactResponse(files=files)

    async def UploadSnapshot(
        self, requests: AsyncIterator[pb.UploadSnapshotRequest], context: Any
    ) -> pb.UploadSnapshotResponse:
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise refused([("header", "must be the stream's first message")])
        check_rules(first)
        if refusal := self._snapshots.refusal(first.header):
            return pb.UploadSnapshotResponse(refusal=refusal)
        snapshot_id = new_snapshot_id()
        upload = ArtifactUpload(self._blobs, snapshot_id, "snapshots")
        try:
            async for request in requests:
                check_rules(request)
                await upload.take(request.chunk)
            files = upload.files(first.header.file_count)
            failpoints.hit("mid-snapshot")
        except BaseException:
            upload.abort()
            await self._snapshots.remove_files(snapshot_id)
            raise
        keeping = self._snapshots.keep(snapshot_id, first.header, files)
        refusal = await uninterrupted(keeping)
        return pb.UploadSnapshotResponse(
            snapshot_id="" if refusal else snapshot_id, refusal=refusal or ""
        )

    async def FetchSnapshot(
        self, request: pb.FetchSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.FetchSnapshotResponse]:
        row = await self._store.snapshot(request.snapshot_id)
        files = None
        if row is not None:
            with suppress(BlobNotFoundError):
                files = await self._snapshots.files(row)
        if row is None or files is None:
            raise TenSafeFault(
                "ARTIFACT_NOT_FOUND",
                f"snapshot {request.snapshot_id} is gone, or its manifest is damaged",
                snapshot_id=request.snapshot_id,
            )
        async for chunk in snapshot_chunks(self._blobs, row.id, files):
            yield pb.FetchSnapshotResponse(chunk=chunk)

    async def FetchArtifact(
        self, request: pb.FetchArtifactRequest, context: Any
    ) -> AsyncIterator[pb.FetchArtifactResponse]:
        artifact = await self._store.artifact(None, request.artifact_id)
        if artifact is None:
            raise TenSafeFault(
                "ARTIFACT_NOT_FOUND",
                f"no artifact {request.artifact_id!r}",
                artifact_id=request.artifact_id,
            )
        async for chunk in artifact_chunks(self._blobs, artifact.id, artifact.files):
            yield pb.FetchArtifactResponse(chunk=chunk)

    async def FetchPrivateBatch(
        self, request: pb.FetchPrivateBatchRequest, context: Any
    ) -> AsyncIterator[pb.FetchPrivateBatchResponse]:
        async for response in self._draws.batches(request):
            yield response
