"""Reading operations, wherever they are: in memory while unfinished, then in the store."""

from __future__ import annotations

import asyncio

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.events.translate import bare_operation, operation_message
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation
from tensafe_server.store.base import Store


def draining() -> TenSafeFault:
    """What callers are told while the server stops."""
    return TenSafeFault(
        "DRAINING",
        "the server is about to stop; what it accepted is kept, so send the same again when it is "
        "back",
        retry_delay_s=0.5,
    )


class OperationReader:
    """Finds a tenant's operations; another tenant's are not found."""

    def __init__(self, store: Store, ledger: Ledger, payloads: Payloads) -> None:
        self._store = store
        self._ledger = ledger
        self._payloads = payloads
        self._draining: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def drain(self) -> None:
        """Sends everyone away who waits."""
        if not self._draining.done():
            self._draining.set_result(None)

    def unfinished(self, tenant_id: str, operation_id: str) -> PendingOperation | None:
        pending = self._ledger.pending(operation_id)
        return pending if pending is not None and pending.row.tenant_id == tenant_id else None

    async def operation(self, tenant_id: str, operation_id: str) -> ops.Operation:
        """An operation with its result, if it has one.

        Raises:
            TenSafeFault: OPERATION_NOT_FOUND.
        """
        pending = self.unfinished(tenant_id, operation_id)
        if pending is not None and not pending.finishing:
            return bare_operation(pending.row)
        if pending is not None:
            await pending.wait_finished()
        row = await self._store.operation(tenant_id, operation_id)
        if row is None:
            raise TenSafeFault(
                "OPERATION_NOT_FOUND",
                f"no operation {operation_id!r}; `tensafe operations list` shows yours",
                operation_id=operation_id,
            )
        return await operation_message(row, self._payloads)

    async def wait(self, tenant_id: str, operation_id: str, timeout_s: float) -> ops.Operation:
        """As `operation`, but first waits for its end, at most `timeout_s` seconds.

        Raises:
            TenSafeFault: DRAINING, if the server is about to stop.
        """
        pending = self.unfinished(tenant_id, operation_id)
        if pending is not None:
            ended = pending.wait_finished()
            await asyncio.wait(
                [ended, self._draining], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._draining.done() and not ended.done():
                raise draining()
        return await self.operation(tenant_id, operation_id)
