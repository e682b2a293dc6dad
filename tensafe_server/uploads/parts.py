"""The bytes of uploads on their way: parts in the blob store, each durable before it is told."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator

from tensafe.v1 import artifacts_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobStore
from tensafe_server.operations.validation import refused
from tensafe_server.store.requests import uninterrupted

PART_BYTES = 4 * 2**20
_READ_BYTES = 2**20


class Parts:
    """One file's parts, named by where they begin. All calls block."""

    def __init__(
        self, blobs: BlobStore, upload_id: str, name: str, folder: str = "uploads"
    ) -> None:
        self._blobs = blobs
        self._prefix = f"{folder}/{upload_id}/{name}/"

    def received_bytes(self) -> int:
        """How far the file is there without a gap."""
        position = 0
        for begin, size in self._spans():
            if begin > position:
                break
            position = max(position, begin + size)
        return position

    def write(self, offset: int, data: bytes) -> None:
        self._blobs.put(f"{self._prefix}{offset:016d}", data)

    def read(self) -> Iterator[bytes]:
        """The file from its beginning, as far as it is there."""
        position = 0
        for begin, size in self._spans():
            if begin > position:
                return
            if begin + size <= position:
                continue
            key = f"{self._prefix}{begin:016d}"
            for piece in self._blobs.read(key, position - begin, _READ_BYTES):
                position += len(piece)
                yield piece

    def digest(self) -> str:
        """SHA-256 of what is there, lower-case hex."""
        digest = hashlib.sha256()
        for piece in self.read():
            digest.update(piece)
        return digest.hexdigest()

    def clear(self) -> None:
        for key, _ in list(self._blobs.sizes(self._prefix)):
            self._blobs.delete(key)

    def _spans(self) -> list[tuple[int, int]]:
        found = self._blobs.sizes(self._prefix)
        return sorted((int(key.rpartition("/")[2]), size) for key, size in found)


async def receive(
    parts: Parts,
    start: pb.UploadFileStart,
    size_bytes: int,
    chunks: AsyncIterator[pb.UploadFileRequest],
) -> int:
    """Stores a file's chunks; returns how many of its bytes are stored then.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, CURSOR_OUT_OF_RANGE, STORAGE_FULL.
    """
    position = await asyncio.to_thread(parts.received_bytes)
    if start.offset != position:
        raise TenSafeFault(
            "CURSOR_OUT_OF_RANGE",
            f"{position} bytes of {start.name} have arrived; go on from there",
            field="start.offset",
            received_bytes=position,
        )
    waiting = bytearray()
    try:
        async for request in chunks:
            chunk = request.chunk
            arrived = position + len(waiting)
            if chunk.name != start.name or chunk.offset != arrived:
                raise refused([("chunk.offset", f"must be {arrived}, of {start.name}")])
            if arrived + len(chunk.data) > size_bytes:
                raise refused([("chunk.data", f"goes beyond the {size_bytes} declared bytes")])
            waiting += chunk.data
            if len(waiting) >= PART_BYTES:
                await asyncio.to_thread(parts.write, position, bytes(waiting))
                position += len(waiting)
                waiting.clear()
    finally:  # also when the stream breaks: what has arrived need not come again
        if waiting:
            await uninterrupted(asyncio.to_thread(parts.write, position, bytes(waiting)))
    return position + len(waiting)


def check_sum(parts: Parts, file: pb.ArtifactFile) -> None:
    """Compares what has arrived with what was declared; drops what differs. Blocks.

    Raises:
        TenSafeFault: INVALID_ARGUMENT if it is not whole, CHECKSUM_MISMATCH.
    """
    if parts.received_bytes() < file.size_bytes:
        raise refused([("upload_id", f"{file.name} has not arrived whole; send the rest")])
    if parts.digest() != file.sha256:
        parts.clear()
        raise TenSafeFault(
            "CHECKSUM_MISMATCH",
            f"{file.name} did not arrive as it was declared and was dropped; send it again",
            file=file.name,
        )
