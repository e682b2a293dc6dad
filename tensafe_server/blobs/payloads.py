"""Where the bytes of specs and results lie: small ones in the row, big ones in the blob store."""

from __future__ import annotations

import asyncio
import hashlib

from tensafe_server.blobs.base import BlobStore

INLINE_BYTES = 64 * 1024


class Payloads:
    """Splits values by size, and brings them back."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def save(self, tenant_id: str, data: bytes) -> tuple[bytes | None, str | None]:
        """Returns (the bytes, None) for a small value, or (None, the key of its durable blob)."""
        if len(data) <= INLINE_BYTES:
            return data, None
        digest = hashlib.sha256(data).hexdigest()
        key = f"payloads/{tenant_id}/{digest[:2]}/{digest}"
        await asyncio.to_thread(self._blobs.put, key, data)
        return None, key

    async def load(self, inline: bytes | None, key: str | None) -> bytes:
        """Raises BlobNotFoundError."""
        if key is None:
            return inline or b""
        return await asyncio.to_thread(self._blobs.get, key)
