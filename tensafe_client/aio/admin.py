"""Tenants, keys and what operators look after, for asyncio."""

from __future__ import annotations

from collections.abc import Callable

from tensafe_client.api import AdminApi
from tensafe_client.infos import (
    KeyInfo,
    NewKey,
    RunSummary,
    StorageInfo,
    TenantInfo,
    VerifyReport,
)
from tensafe_client.session import Session


class AsyncAdmin:
    """What operators do; every call needs an admin key. See `tensafe_client.admin.Admin`."""

    def __init__(self, session: Session) -> None:
        self._io = session.io
        self._api = AdminApi(session)

    async def create_tenant(self, name: str) -> TenantInfo:
        """Creates a tenant."""
        return await self._io.bridge(self._api.create_tenant(name))

    async def tenants(self) -> list[TenantInfo]:
        """Lists the tenants, by name."""
        return await self._io.bridge(self._api.tenants())

    async def storage(self) -> StorageInfo:
        """Asks what takes how much disk on the server."""
        return await self._io.bridge(self._api.storage())

    async def runs(
        self,
        tenant: str | None = None,
        *,
        include_deleted: bool = False,
        limit: int | None = None,
    ) -> list[RunSummary]:
        """Lists runs, newest first; of one tenant, by name or id, or of all."""
        return await self._io.bridge(self._api.runs(tenant, include_deleted, limit))

    async def verify_run(
        self, run_id: str, *, on_progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Replays a run of any tenant from its log on a worker, and compares the results."""
        return await self._io.bridge(self._api.verify_run(run_id, on_progress))

    async def create_key(
        self, tenant: str | None = None, *, kind: str = "tenant", name: str = ""
    ) -> NewKey:
        """Creates a key; its secret is shown this once."""
        return await self._io.bridge(self._api.create_key(kind, tenant, name))

    async def keys(self, tenant: str | None = None) -> list[KeyInfo]:
        """Lists a tenant's keys, oldest first; None: the admin and worker keys."""
        return await self._io.bridge(self._api.keys(tenant))

    async def revoke_key(self, key_id: str) -> KeyInfo:
        """Revokes a key at once."""
        return await self._io.bridge(self._api.revoke_key(key_id))
