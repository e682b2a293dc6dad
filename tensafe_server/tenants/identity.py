"""Tenants and their keys.

A key is 256 random bits; the store has only its SHA-256, so a stolen store opens nothing. All keys
are held in memory: they are few, and every call asks for one.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, replace

from tensafe.v1 import admin_pb2 as admin
from tensafe.wire.status import TenSafeFault
from tensafe_server.ids import new_id
from tensafe_server.store.base import KeyRow, RequestRow, Store, TenantRow

SECRET_PREFIX = "ts_"  # noqa: S105 - what secret scanners look for


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call. `tenant_id` is empty for admin and worker keys."""

    kind: int
    tenant_id: str
    key_id: str


class Identity:
    """The tenants and keys of this deployment."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tenants: dict[str, TenantRow] = {}
        self._keys: dict[str, KeyRow] = {}
        self._by_secret: dict[bytes, KeyRow] = {}

    async def load(self) -> None:
        """Reads what the store has."""
        for tenant in await self._store.tenants():
            self._tenants[tenant.id] = tenant
        for key in await self._store.keys():
            self._remember(key)

    def authenticate(self, secret: str) -> Principal | None:
        """The owner of a secret, or None if it is unknown or revoked."""
        key = self._by_secret.get(_digest(secret))
        if key is None or key.revoked_ns is not None:
            return None
        return Principal(key.kind, key.tenant_id or "", key.id)

    async def create_tenant(self, name: str, request: RequestRow | None = None) -> TenantRow:
        """Raises TenSafeFault NAME_TAKEN."""
        if any(tenant.name == name for tenant in self._tenants.values()):
            raise TenSafeFault(
                "NAME_TAKEN", f"a tenant named {name!r} exists; choose another name", field="name"
            )
        row = TenantRow(request.subject if request else new_id("ten"), name, time.time_ns())
        self._tenants[row.id] = row
        try:
            await self._store.add_tenant(row, request)
        except BaseException:
            del self._tenants[row.id]
            raise
        return row

    def tenants(self) -> list[TenantRow]:
        return sorted(self._tenants.values(), key=lambda tenant: tenant.name)

    def tenant(self, name_or_id: str) -> TenantRow:
        """Raises TenSafeFault TENANT_NOT_FOUND."""
        for tenant in self._tenants.values():
            if name_or_id in (tenant.id, tenant.name):
                return tenant
        raise TenSafeFault(
            "TENANT_NOT_FOUND",
            f"no tenant {name_or_id!r}; `tensafe admin tenants list` shows those that exist",
            tenant=name_or_id,
        )

    async def create_key(
        self, kind: int, tenant_id: str | None, name: str, request: RequestRow | None = None
    ) -> tuple[KeyRow, str]:
        """A new key and its secret, which is nowhere else."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        key_id = request.subject if request else new_id("key")
        row = KeyRow(key_id, _digest(secret), kind, tenant_id, name, time.time_ns())
        await self._store.add_key(row, request)
        self._remember(row)
        return row, secret

    def passing_key(self, kind: int) -> str:
        """The secret of a new key without tenant that ends with this process: it is in no store and
        no list, and cannot be revoked."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        digest = _digest(secret)
        self._by_secret[digest] = KeyRow(new_id("key"), digest, kind, None, "", time.time_ns())
        return secret

    def keys(self, tenant_id: str | None) -> list[KeyRow]:
        return [key for key in self._keys.values() if key.tenant_id == tenant_id]

    async def revoke_key(self, key_id: str) -> KeyRow:
        """Raises TenSafeFault KEY_NOT_FOUND."""
        key = self._keys.get(key_id)
        if key is None:
            raise TenSafeFault(
                "KEY_NOT_FOUND",
                f"no key {key_id!r}; `tensafe admin keys list` shows those that exist",
                key_id=key_id,
            )
        if key.revoked_ns is None:
            key = replace(key, revoked_ns=time.time_ns())
            await self._store.revoke_key(key_id, key.revoked_ns or 0)
            self._remember(key)
        return key

    def is_revoked(self, key_id: str) -> bool:
        """Whether a key that was good when a call began is no good any more."""
        key = self._keys.get(key_id)
        return key is not None and key.revoked_ns is not None

    def _remember(self, key: KeyRow) -> None:
        self._keys[key.id] = key
        self._by_secret[key.secret_sha256] = key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


KIND_NAMES: dict[int, str] = {
    admin.KEY_KIND_TENANT: "tenant",
    admin.KEY_KIND_ADMIN: "admin",
    admin.KEY_KIND_WORKER: "worker",
}
