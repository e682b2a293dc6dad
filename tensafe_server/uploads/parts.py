"""The bytes of uploads on their way: parts in the blob store, each durable before it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from tensafe_server.blobs.base import BlobStore

PART_BYTES = 4 * 2**20
_READ_BYTES = 2**20


class Parts:
    """One file's parts, named by where they begin. All calls block."""

    def __init__(self, blobs: BlobStore, upload_id: str, name: str) -> None:
        self._blobs = blobs
        self._prefix = f"uploads/{upload_id}/{name}/"

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
