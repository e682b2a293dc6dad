"""Artifacts: there for their tenants until deleted or expired, and while a recovery needs them.

Deleting has two parts. First the artifact is marked, and from then on it answers ARTIFACT_EXPIRED;
then its files are removed. A crash in between is made good at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tensafe.v1.artifacts_pb2 import Artifact, DeleteArtifactRequest
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobStore
from tensafe_server.events.translate import timestamp
from tensafe_server.operations.ledger import Ledger
from tensafe_server.storage_faults import RETRY_AFTER_S
from tensafe_server.store.base import Store
from tensafe_server.store.requests import first_request, new_request, uninterrupted

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 60.0
"""When to look again at an expired artifact that something still needs."""


def artifact_prefix(artifact_id: str) -> str:
    """Where an artifact's files lie in the blob store."""
    return f"artifacts/{artifact_id}/"


def check_there(artifact: Artifact) -> None:
    """Raises TenSafeFault ARTIFACT_EXPIRED for one that its tenant no longer has."""
    expired = artifact.HasField("expires_at") and (
        artifact.expires_at.ToNanoseconds() <= time.time_ns()
    )
    if not expired and not artifact.HasField("deleted_at"):
        return
    how = "its time to live is over" if expired else "it was deleted"
    raise TenSafeFault(
        "ARTIFACT_EXPIRED",
        f"artifact {artifact.id} is gone: {how}; `tensafe artifacts list` shows those that are "
        "there",
        artifact_id=artifact.id,
    )


class ArtifactBook:
    """Reads, deletes and expires artifacts."""

    def __init__(self, store: Store, ledger: Ledger, blobs: BlobStore) -> None:
        self._store = store
        self._ledger = ledger
        self._blobs = blobs
        self._closing: set[str] = set()
        self._wake = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    async def artifact(self, tenant_id: str, artifact_id: str) -> Artifact:
        """Raises TenSafeFault ARTIFACT_NOT_FOUND or ARTIFACT_EXPIRED."""
        artifact = await self._find(tenant_id, artifact_id)
        check_there(artifact)
        return artifact

    def check_open(self, artifact: Artifact) -> None:
        """Called in the same turn in which an operation on the artifact is accepted.

        Raises:
            TenSafeFault: STORAGE_UNAVAILABLE while it is being deleted: the next try will tell.
        """
        if artifact.id in self._closing:
            raise TenSafeFault(
                "STORAGE_UNAVAILABLE",
                f"artifact {artifact.id} is being deleted at this moment; ask again",
                retry_delay_s=RETRY_AFTER_S,
                artifact_id=artifact.id,
            )

    async def delete(self, tenant_id: str, request: DeleteArtifactRequest) -> Artifact:
        """Deletes an artifact; one that is gone already is no error.

        Raises:
            TenSafeFault: ARTIFACT_NOT_FOUND, ARTIFACT_IN_USE, REQUEST_ID_CONFLICT.
        """
        return await uninterrupted(self._delete(tenant_id, request))

    async def _delete(self, tenant_id: str, request: DeleteArtifactRequest) -> Artifact:
        known = await first_request(self._store, tenant_id, request)
        artifact = await self._find(tenant_id, request.artifact_id)
        if known is None:
            if not artifact.HasField("deleted_at"):
                await self._mark(artifact)
            await self._store.remember(new_request(tenant_id, request, artifact.id))
        await self._remove_files()
        return await self._find(tenant_id, artifact.id)

    def news(self) -> None:
        """Something was saved, or is no longer needed: there may be something to expire."""
        self._wake.set()

    def start(self) -> None:
        """Begins to remove what has expired, and goes on with what a crash has left."""
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def _find(self, tenant_id: str, artifact_id: str) -> Artifact:
        artifact = await self._store.artifact(tenant_id, artifact_id)
        if artifact is None:
            raise TenSafeFault(
                "ARTIFACT_NOT_FOUND",
                f"no artifact {artifact_id!r}; `tensafe artifacts list` shows yours",
                artifact_id=artifact_id,
            )
        return artifact

    async def _mark(self, artifact: Artifact) -> None:
        """Notes that it is gone, unless something needs it.

        From the first line on no operation is accepted that would; what was accepted before is in
        the ledger or in the store.
        """
        self._closing.add(artifact.id)
        try:
            use = self._ledger.reader_of(artifact.id) or await self._store.artifact_use(artifact.id)
            if use is not None:
                raise TenSafeFault(
                    "ARTIFACT_IN_USE",
                    f"artifact {artifact.id} is still needed by {use}; wait for the operation, or "
                    "save the run again or delete it, then delete the artifact",
                    artifact_id=artifact.id,
                    needed_by=use,
                )
            artifact.deleted_at.CopyFrom(timestamp(time.time_ns()))
            await self._store.delete_artifact(artifact)
        finally:
            self._closing.discard(artifact.id)

    async def _remove_files(self) -> None:
        for artifact_id in await self._store.artifacts_to_remove():
            await asyncio.to_thread(self._delete_blobs, artifact_prefix(artifact_id))
            await self._store.artifact_removed(artifact_id)

    def _delete_blobs(self, prefix: str) -> None:
        for key, _ in list(self._blobs.sizes(prefix)):
            self._blobs.delete(key)

    async def _sweep(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause_s = await self._expire()
                await self._remove_files()
            except TenSafeFault as fault:  # the disk; it goes on when that does
                log.warning("expired artifacts wait: %s", fault)
                pause_s = _LOOK_AGAIN_S
            except Exception:
                log.exception("removing expired artifacts failed; tried again later")
                pause_s = _LOOK_AGAIN_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _expire(self) -> float | None:
        """Marks what has expired and is not needed; returns when to come again, seconds."""
        needed = False
        for artifact in await self._store.expired_artifacts(time.time_ns()):
            try:
                await self._mark(artifact)
                log.info("artifact %s has expired", artifact.id)
            except TenSafeFault as fault:
                if fault.detail.reason != "ARTIFACT_IN_USE":
                    raise
                needed = True
        now = time.time_ns()
        following = await self._store.next_expiry(now)
        pauses_s = [_LOOK_AGAIN_S] if needed else []
        if following is not None:
            pauses_s.append(max(0.0, (following - now) / 1e9) + 0.001)
        return min(pauses_s, default=None)
