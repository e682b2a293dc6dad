"""What the coordinator asks of its blob store. All calls block: use them from a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

KEY_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*"
"""A key: parts of safe characters, none of which begins with a dot, joined by slashes."""


class BlobNotFoundError(KeyError):
    """No blob has this key."""


class BlobWriter(Protocol):
    """A blob in the making: nothing is seen of it before `commit`."""

    def write(self, data: bytes) -> None: ...

    def commit(self) -> None:
        """Makes the blob durable under its key, replacing one of that key."""

    def abort(self) -> None:
        """Forgets it; no error after `commit`."""


class BlobStore(Protocol):
    """Bytes by key. Whatever writes raises TenSafeFault STORAGE_FULL or STORAGE_UNAVAILABLE if the
    disk does not take it; nothing is seen of the blob then."""

    def writer(self, key: str) -> BlobWriter: ...

    def put(self, key: str, data: bytes) -> None:
        """Makes a small blob durable under its key."""

    def get(self, key: str) -> bytes:
        """Raises BlobNotFoundError."""

    def read(self, key: str, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        """The blob from `offset` on, in pieces. Raises BlobNotFoundError."""

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Forgets a blob; no error if there is none."""

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every blob below a prefix, which ends at a slash or is empty."""

    def sweep_partial(self) -> int:
        """Removes what crashed writers have left; returns how many. Call it before any writer."""
