"""Tenants, keys and what operators look after, for code without an event loop."""

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


class Admin:
    """What operators do; every call needs an admin key. It is `ServiceClient.admin`."""

    def __init__(self, session: Session) -> None:
        self._io = session.io
        self._api = AdminApi(session)

    def create_tenant(self, name: str) -> TenantInfo:
        """Creates a tenant.

        Args:
            name: unique; letters, digits, `-`, `_` and `.`.

        Raises:
            NameTakenError: if there is one of that name.
        """
        return self._io.run(self._api.create_tenant(name))

    def tenants(self) -> list[TenantInfo]:
        """Lists the tenants, by name."""
        return self._io.run(self._api.tenants())

    def storage(self) -> StorageInfo:
        """Asks what takes how much disk on the server."""
        return self._io.run(self._api.storage())

    def runs(
        self,
        tenant: str | None = None,
        *,
        include_deleted: bool = False,
        limit: int | None = None,
    ) -> list[RunSummary]:
        """Lists runs, newest first.

        Args:
            tenant: a tenant's name or id; None: all tenants'.
            include_deleted: also deleted runs.
            limit: at most so many.
        """
        return self._io.run(self._api.runs(tenant, include_deleted, limit))

    def verify_run(
        self, run_id: str, *, on_progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Replays a run of any tenant from its log on a worker, beside the run itself, and compares
        the results; see `ServiceClient.verify_run`."""
        return self._io.run(self._api.verify_run(run_id, on_progress))

    def create_key(
        self, tenant: str | None = None, *, kind: str = "tenant", name: str = ""
    ) -> NewKey:
        """Creates a key; its secret is shown this once.

        Args:
            tenant: the tenant's name or id; needed for a tenant key, None for the others.
            kind: "tenant", "admin" or "worker".
            name: free text for people.
        """
        return self._io.run(self._api.create_key(kind, tenant, name))

    def keys(self, tenant: str | None = None) -> list[KeyInfo]:
        """Lists a tenant's keys, oldest first; None: the admin and worker keys."""
        return self._io.run(self._api.keys(tenant))

    def revoke_key(self, key_id: str) -> KeyInfo:
        """Revokes a key at once."""
        return self._io.run(self._api.revoke_key(key_id))
