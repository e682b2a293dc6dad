"""ArtifactsService."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from tensafe.v1 import artifacts_pb2 as pb
from tensafe.v1 import artifacts_pb2_grpc as rpc
from tensafe.wire.status import TenSafeFault
from tensafe_server.api.files import artifact_chunks
from tensafe_server.api.guard import caller
from tensafe_server.api.pages import page, token
from tensafe_server.blobs.base import BlobStore
from tensafe_server.operations.artifacts import ArtifactBook
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.validation import check_rules, refused
from tensafe_server.store.base import Store
from tensafe_server.uploads.desk import UploadDesk


class ArtifactsServicer(rpc.ArtifactsServiceServicer):
    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        blobs: BlobStore,
        artifacts: ArtifactBook,
        uploads: UploadDesk,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._blobs = blobs
        self._artifacts = artifacts
        self._uploads = uploads

    async def GetArtifact(
        self, request: pb.GetArtifactRequest, context: Any
    ) -> pb.GetArtifactResponse:
        return pb.GetArtifactResponse(artifact=await self._artifact(request.artifact_id))

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: Any
    ) -> pb.ListArtifactsResponse:
        tenant_id = caller().tenant_id
        if request.run_id:
            self._ledger.run(tenant_id, request.run_id)
        wanted = page(request.page_size, request.page_token)
        rows = await self._store.artifacts(
            tenant_id, request.run_id or None, wanted, time.time_ns()
        )
        return pb.ListArtifactsResponse(
            artifacts=[artifact for _, artifact in rows],
            next_page_token=token(wanted, len(rows), rows[-1][0] if rows else 0),
        )

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        artifact = await self._artifact(request.artifact_id)
        files = [file for file in artifact.files if request.file in ("", file.name)]
        if not files:
            names = ", ".join(file.name for file in artifact.files)
            raise refused([("file", f"{artifact.id} has no {request.file!r}; it has {names}")])
        if request.HasField("offset") and not request.HasField("file"):
            raise refused([("offset", "needs `file`, since offsets are within one file")])
        if request.offset > files[0].size_bytes:
            raise TenSafeFault(
                "CURSOR_OUT_OF_RANGE",
                f"offset {request.offset} is past the end of {files[0].name}, "
                f"{files[0].size_bytes} bytes",
                field="offset",
            )
        try:
            async for chunk in artifact_chunks(self._blobs, artifact.id, files, request.offset):
                yield pb.DownloadArtifactResponse(chunk=chunk)
        except TenSafeFault:
            await self._artifact(artifact.id)  # says so if it was deleted meanwhile
            raise

    async def DeleteArtifact(
        self, request: pb.DeleteArtifactRequest, context: Any
    ) -> pb.DeleteArtifactResponse:
        artifact = await self._artifacts.delete(caller().tenant_id, request)
        return pb.DeleteArtifactResponse(artifact=artifact)

    async def BeginUpload(
        self, request: pb.BeginUploadRequest, context: Any
    ) -> pb.BeginUploadResponse:
        return await self._uploads.begin(caller().tenant_id, request)

    async def UploadFile(
        self, requests: AsyncIterator[pb.UploadFileRequest], context: Any
    ) -> pb.UploadFileResponse:
        first = await anext(requests, None)
        if first is None or not first.HasField("start"):
            raise refused([("start", "must be the stream's first message")])
        check_rules(first)
        received = await self._uploads.receive(caller().tenant_id, first.start, _checked(requests))
        return pb.UploadFileResponse(received_bytes=received)

    async def FinishUpload(
        self, request: pb.FinishUploadRequest, context: Any
    ) -> pb.FinishUploadResponse:
        artifact = await self._uploads.finish(caller().tenant_id, request)
        return pb.FinishUploadResponse(artifact=artifact)

    async def _artifact(self, artifact_id: str) -> pb.Artifact:
        return await self._artifacts.artifact(caller().tenant_id, artifact_id)


async def _checked(
    requests: AsyncIterator[pb.UploadFileRequest],
) -> AsyncIterator[pb.UploadFileRequest]:
    async for request in requests:
        if not request.HasField("chunk"):
            raise refused([("chunk", "must be in every message after the first")])
        check_rules(request)
        yield request
