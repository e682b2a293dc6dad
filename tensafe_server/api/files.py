"""Files in chunks: how artifacts and tokenizers leave the blob store, and artifacts enter it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.v1.types_pb2 import FileChunk
from tensafe.wire.channel import CHUNK_BYTES
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobNotFoundError, BlobStore, BlobWriter
from tensafe_server.operations.snapshots import snapshot_key


def artifact_key(artifact_id: str, name: str) -> str:
    return f"artifacts/{artifact_id}/{name}"


async def artifact_chunks(
    blobs: BlobStore, artifact_id: str, files: Sequence[ArtifactFile], offset: int = 0
) -> AsyncIterator[FileChunk]:
    """An artifact's files, the first one from `offset` on.

    Raises:
        TenSafeFault: CHECKSUM_MISMATCH if what is stored is not what was saved; it comes with the
            last chunk, or instead of one.
    """
    for file in files:
        key = artifact_key(artifact_id, file.name)
        async for chunk in _chunks(blobs, key, file.name, file.size_bytes, offset, file.sha256):
            yield chunk
        offset = 0


async def snapshot_chunks(
    blobs: BlobStore, snapshot_id: str, files: Sequence[ArtifactFile]
) -> AsyncIterator[FileChunk]:
    """A snapshot's files, as `artifact_chunks`."""
    for file in files:
        key = snapshot_key(snapshot_id, file.name)
        async for chunk in _chunks(blobs, key, file.name, file.size_bytes, 0, file.sha256):
            yield chunk


async def tokenizer_chunks(
    blobs: BlobStore, files: Sequence[tuple[str, str]]
) -> AsyncIterator[FileChunk]:
    """Files given as (name, blob key)."""
    for name, key in files:
        data = await asyncio.to_thread(blobs.get, key)
        digest = hashlib.sha256(data).hexdigest()
        async for chunk in _chunks(blobs, key, name, len(data), 0, digest):
            yield chunk


async def _chunks(
    blobs: BlobStore, key: str, name: str, size: int, offset: int, sha256: str
) -> AsyncIterator[FileChunk]:
    digest = hashlib.sha256()
    position = 0
    held: FileChunk | None = None
    try:
        pieces = blobs.read(key, 0, CHUNK_BYTES)
        while piece := await asyncio.to_thread(next, pieces, b""):
            digest.update(piece)
            start = max(offset - position, 0)
            if start < len(piece):
                if held is not None:
                    yield held
                held = FileChunk(
                    name=name, offset=position + start, data=piece[start:], size_bytes=size
                )
            position += len(piece)
    except BlobNotFoundError:
        position = -1
    if position != size or digest.hexdigest() != sha256:
        raise TenSafeFault(
            "CHECKSUM_MISMATCH",
            f"file {name} of {key.split('/')[1]} is damaged or missing on the server; restore it "
            "from a backup, or save again",
            file=name,
        )
    last = held or FileChunk(name=name, offset=offset, size_bytes=size)
    last.sha256 = sha256
    yield last


class ArtifactUpload:
    """Receives an artifact's files from a worker."""

    def __init__(self, blobs: BlobStore, artifact_id: str, kind: str = "artifacts") -> None:
        self._blobs = blobs
        self._prefix = f"{kind}/{artifact_id}"
        self._files: list[ArtifactFile] = []
        self._writer: BlobWriter | None = None
        self._name = ""
        self._position = 0
        self._digest = hashlib.sha256()

    async def take(self, chunk: FileChunk) -> None:
        """Raises TenSafeFault INVALID_ARGUMENT or CHECKSUM_MISMATCH."""
        if self._writer is None:
            key = f"{self._prefix}/{chunk.name}"
            self._writer = self._blobs.writer(key)
            self._name, self._position, self._digest = chunk.name, 0, hashlib.sha256()
        if chunk.name != self._name or chunk.offset != self._position:
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"expected byte {self._position} of {self._name}, got byte {chunk.offset} of "
                f"{chunk.name}",
                field="chunk.offset",
            )
        await asyncio.to_thread(self._writer.write, chunk.data)
        self._digest.update(chunk.data)
        self._position += len(chunk.data)
        if chunk.sha256:
            await self._finish_file(chunk)

    async def _finish_file(self, chunk: FileChunk) -> None:
        assert self._writer is not None
        if chunk.sha256 != self._digest.hexdigest() or chunk.size_bytes != self._position:
            raise TenSafeFault(
                "CHECKSUM_MISMATCH", f"file {self._name} was changed on its way", file=self._name
            )
        await asyncio.to_thread(self._writer.commit)
        self._files.append(
            ArtifactFile(name=self._name, size_bytes=self._position, sha256=chunk.sha256)
        )
        self._writer = None

    def files(self, count: int = 0) -> list[ArtifactFile]:
        """The files received, in name order.

        Args:
            count: how many there are; 0: that is not known.

        Raises:
            TenSafeFault: INVALID_ARGUMENT: the stream has ended before that. So does one that
                breaks, for whoever reads it.
        """
        if self._writer is not None or (count and len(self._files) != count):
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"the stream ended after {len(self._files)} of {count or 'its'} files; send all",
                field="file_count",
            )
        return sorted(self._files, key=lambda file: file.name)

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()
