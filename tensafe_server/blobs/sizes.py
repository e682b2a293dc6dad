"""How much room blobs take, by kind."""

from __future__ import annotations

from dataclasses import dataclass

from tensafe_server.blobs.base import BlobStore

_KINDS = ("payloads", "snapshots", "artifacts")


@dataclass(slots=True)
class BlobUse:
    """Blobs of one kind, and their bytes."""

    blobs: int = 0
    size_bytes: int = 0


def blob_use(blobs: BlobStore) -> dict[str, BlobUse]:
    """`payloads`, `snapshots`, `artifacts` and `other`; looks at every blob."""
    use = {kind: BlobUse() for kind in (*_KINDS, "other")}
    for key, size in blobs.sizes():
        kind = key.partition("/")[0]
        entry = use[kind if kind in _KINDS else "other"]
        entry.blobs += 1
        entry.size_bytes += size
    return use
