"""AdminService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tensafe.v1 import admin_pb2 as pb
from tensafe.v1 import admin_pb2_grpc as rpc
from tensafe_server.api.pages import page, token
from tensafe_server.blobs.base import BlobStore
from tensafe_server.blobs.sizes import blob_use
from tensafe_server.events.translate import timestamp
from tensafe_server.fleet.verify import Verifications
from tensafe_server.ids import new_id
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState
from tensafe_server.operations.runs import RunBook
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.operations.validation import refused
from tensafe_server.store.base import KeyRow, Store, TenantRow
from tensafe_server.store.requests import first_request, new_request, uninterrupted
from tensafe_server.tenants.identity import Identity

_SCOPE = "admin"


class AdminServicer(rpc.AdminServiceServicer):
    def __init__(
        self,
        store: Store,
        identity: Identity,
        ledger: Ledger,
        runs: RunBook,
        blobs: BlobStore,
        snapshots: SnapshotBook,
        verifications: Verifications,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._runs = runs
        self._verifications = verifications
        self._blobs = blobs
        self._snapshots = snapshots
        self._identity = identity
        self._creating = asyncio.Lock()

    async def CreateTenant(
        self, request: pb.CreateTenantRequest, context: Any
    ) -> pb.CreateTenantResponse:
        return pb.CreateTenantResponse(tenant=_tenant(await uninterrupted(self._tenant(request))))

    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: Any
    ) -> pb.ListTenantsResponse:
        return pb.ListTenantsResponse(tenants=[_tenant(row) for row in self._identity.tenants()])

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        for_tenant = request.kind == pb.KEY_KIND_TENANT
        if for_tenant != bool(request.tenant):
            raise refused([("tenant", "is required for a tenant key and must be unset for others")])
        tenant_id = self._identity.tenant(request.tenant).id if for_tenant else None
        row, secret = await uninterrupted(self._new_key(request, tenant_id))
        return pb.CreateKeyResponse(key=_key(row), secret=secret)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        tenant_id = self._identity.tenant(request.tenant).id if request.tenant else None
        return pb.ListKeysResponse(keys=[_key(row) for row in self._identity.keys(tenant_id)])

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        await first_request(self._store, _SCOPE, request)
        row = await self._identity.revoke_key(request.key_id)
        await self._store.remember(new_request(_SCOPE, request, row.id))
        return pb.RevokeKeyResponse(key=_key(row))

    async def GetStorage(
        self, request: pb.GetStorageRequest, context: Any
    ) -> pb.GetStorageResponse:
        use = await self._store.use()
        sizes = await asyncio.to_thread(blob_use, self._blobs)
        return pb.GetStorageResponse(
            log=pb.StorageUse(count=use.operations, size_bytes=use.file_bytes),
            log_free_bytes=use.free_bytes,
            payloads=pb.StorageUse(
                count=sizes["payloads"].blobs, size_bytes=sizes["payloads"].size_bytes
            ),
            snapshots=pb.StorageUse(count=use.snapshots, size_bytes=sizes["snapshots"].size_bytes),
            artifacts=pb.StorageUse(count=use.artifacts, size_bytes=sizes["artifacts"].size_bytes),
            other=pb.StorageUse(count=sizes["other"].blobs, size_bytes=sizes["other"].size_bytes),
            damaged_snapshots=self._snapshots.damaged,
        )

    async def ListRuns(
        self, request: pb.AdminServiceListRunsRequest, context: Any
    ) -> pb.AdminServiceListRunsResponse:
        tenant_id = self._identity.tenant(request.tenant).id if request.tenant else None
        wanted = page(request.page_size, request.page_token)
        found = self._runs.newest_first(tenant_id, wanted, deleted=request.include_deleted)
        return pb.AdminServiceListRunsResponse(
            runs=[_summary(run) for run in found],
            next_page_token=token(wanted, len(found), found[-1].row.created_ns if found else 0),
        )

    async def VerifyRun(
        self, request: pb.AdminServiceVerifyRunRequest, context: Any
    ) -> AsyncIterator[pb.AdminServiceVerifyRunResponse]:
        run = self._ledger.any_run(request.run_id)
        async with aclosing(self._verifications.verify(run)) as messages:
            async for message in messages:
                if message.HasField("report"):
                    yield pb.AdminServiceVerifyRunResponse(report=message.report)
                else:
                    yield pb.AdminServiceVerifyRunResponse(progress=message.progress)

    async def _tenant(self, request: pb.CreateTenantRequest) -> TenantRow:
        async with self._creating:
            known = await first_request(self._store, _SCOPE, request)
            if known is not None:
                return self._identity.tenant(known.subject)
            record = new_request(_SCOPE, request, new_id("ten"))
            return await self._identity.create_tenant(request.name, record)

    async def _new_key(
        self, request: pb.CreateKeyRequest, tenant_id: str | None
    ) -> tuple[KeyRow, str]:
        async with self._creating:
            known = await first_request(self._store, _SCOPE, request)
            if known is not None:
                await self._identity.revoke_key(known.subject)
            record = new_request(_SCOPE, request, new_id("key"))
            return await self._identity.create_key(request.kind, tenant_id, request.name, record)


def _tenant(row: TenantRow) -> pb.Tenant:
    return pb.Tenant(id=row.id, name=row.name, created_at=timestamp(row.created_ns))


def _summary(run: RunState) -> pb.RunSummary:
    return pb.RunSummary(
        id=run.id,
        tenant_id=run.tenant_id,
        model=run.model,
        status=run.status,  # type: ignore[arg-type]
        step=run.step,
        created_at=timestamp(run.row.created_ns),
        replay_mismatches=run.replay_mismatches,
        snapshot_seq=run.snapshot_seq,
    )


def _key(row: KeyRow) -> pb.Key:
    return pb.Key(
        id=row.id,
        kind=row.kind,  # type: ignore[arg-type]
        tenant_id=row.tenant_id or "",
        name=row.name,
        created_at=timestamp(row.created_ns),
        revoked_at=timestamp(row.revoked_ns) if row.revoked_ns is not None else None,
    )
