"""ArtifactsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from tensafe.v1 import artifacts_pb2 as pb
from tensafe.v1 import artifacts_pb2_grpc as rpc
from tensafe.wire.status import TenSafeFault
from tensafe_server.api.files import artifact_chunks
from tensafe_server.api.guard import caller
from tensafe_server.api.pages import page, token
from tensafe_server.blobs.base import BlobStore
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.validation import refused
from tensafe_server.store.base import Store


class ArtifactsServicer(rpc.ArtifactsServiceServicer):
    def __init__(self, store: Store, ledger: Ledger, blobs: BlobStore) -> None:
        self._store = store
        self._ledger = ledger
        self._blobs = blobs

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
        rows = await self._store.artifacts(tenant_id, request.run_id or None, wanted)
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
        if request.offset and not request.file:
            raise refused([("offset", "needs `file`, since offsets are within one file")])
        if request.offset > files[0].size_bytes:
            raise TenSafeFault(
                "CURSOR_OUT_OF_RANGE",
                f"offset {request.offset} is past the end of {files[0].name}, "
                f"{files[0].size_bytes} bytes",
                field="offset",
            )
        async for chunk in artifact_chunks(self._blobs, artifact.id, files, request.offset):
            yield pb.DownloadArtifactResponse(chunk=chunk)

    async def _artifact(self, artifact_id: str) -> pb.Artifact:
        artifact = await self._store.artifact(caller().tenant_id, artifact_id)
        if artifact is None:
            raise TenSafeFault(
                "ARTIFACT_NOT_FOUND",
                f"no artifact {artifact_id!r}; `tensafe artifacts list` shows yours",
                artifact_id=artifact_id,
            )
        return artifact
