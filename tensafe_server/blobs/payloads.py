"""Where the bytes of specs and results lie: small ones in the row, big ones in the blob store."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import secrets
from collections.abc import Sequence

from tensafe_server.blobs.base import BlobStore

INLINE_BYTES = 64 * 1024


class DamagedPayloadError(Exception):
    """A stored spec or result is not what was stored, or lies where the disk is broken."""


class Payloads:
    """Splits values by size, and brings them back."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def save(self, tenant_id: str, data: bytes) -> tuple[bytes | None, str | None]:
        """Returns (the bytes, None) for a small value, or (None, the key of its durable blob)."""
        if len(data) <= INLINE_BYTES:
            return data, None
        digest = hashlib.sha256(data).hexdigest()
        # Each blob has one owner, so that it can go when its row goes, whatever else is stored.
        key = f"payloads/{tenant_id}/{digest[:2]}/{digest}.{secrets.token_hex(4)}"
        await asyncio.to_thread(self._blobs.put, key, data)
        return None, key

    async def load(self, inline: bytes | None, key: str | None) -> bytes:
        """Raises BlobNotFoundError, DamagedPayloadError."""
        if key is None:
            return inline or b""
        return await asyncio.to_thread(self._get, key)

    async def delete(self, keys: Sequence[str]) -> None:
        """Forgets blobs that no row names any more."""
        for key in keys:
            await asyncio.to_thread(self._blobs.delete, key)

    def _get(self, key: str) -> bytes:
        try:
            data = self._blobs.get(key)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedPayloadError(key) from error  # a part of the disk is broken
        digest = key.rpartition("/")[2].partition(".")[0]
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedPayloadError(key)
        return data
