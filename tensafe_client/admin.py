"""Tenants and keys, for code without an event loop."""

from __future__ import annotations

from tensafe_client.api import AdminApi
from tensafe_client.infos import KeyInfo, NewKey, StorageInfo, TenantInfo
from tensafe_client.session import Session


class Admin:
    """Tenants and keys; every call needs an admin key. It is `ServiceClient.admin`."""

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
