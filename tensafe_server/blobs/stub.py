"""Blobs in memory, for tests."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tensafe_server.blobs.base import KEY_PATTERN, BlobNotFoundError


class StubBlobStore:
    """A dict that keeps the rules of a `BlobStore`."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def writer(self, key: str) -> StubBlobWriter:
        if not re.fullmatch(KEY_PATTERN, key):
            raise ValueError(f"not a blob key: {key!r}")
        return StubBlobWriter(self, key)

    def put(self, key: str, data: bytes) -> None:
        writer = self.writer(key)
        writer.write(data)
        writer.commit()

    def get(self, key: str) -> bytes:
        if key not in self.blobs:
            raise BlobNotFoundError(key)
        return self.blobs[key]

    def read(self, key: str, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        data = self.get(key)
        for start in range(offset, len(data), chunk_bytes):
            yield data[start : start + chunk_bytes]

    def exists(self, key: str) -> bool:
        return key in self.blobs

    def delete(self, key: str) -> None:
        self.blobs.pop(key, None)

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, data in list(self.blobs.items()):
            if key.startswith(prefix):
                yield key, len(data)

    def sweep_partial(self) -> int:
        return 0


class StubBlobWriter:
    def __init__(self, store: StubBlobStore, key: str) -> None:
        self._store, self._key, self._parts = store, key, bytearray()

    def write(self, data: bytes) -> None:
        self._parts += data

    def commit(self) -> None:
        self._store.blobs[self._key] = bytes(self._parts)

    def abort(self) -> None:
        self._parts.clear()
