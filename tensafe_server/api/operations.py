"""OperationsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tensafe.v1 import operations_pb2 as pb
from tensafe.v1 import operations_pb2_grpc as rpc
from tensafe_server.api.guard import caller
from tensafe_server.api.pages import page, token
from tensafe_server.events.hub import EventHub
from tensafe_server.events.translate import bare_operation
from tensafe_server.fleet.cancel import Cancellation
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.lookup import OperationReader
from tensafe_server.operations.streaming import SampleStreams
from tensafe_server.store.base import EventScope, Store
from tensafe_server.store.requests import first_request, new_request

_DEFAULT_WAIT_S = 30.0


class OperationsServicer(rpc.OperationsServiceServicer):
    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        reader: OperationReader,
        cancellation: Cancellation,
        hub: EventHub,
        streams: SampleStreams,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._reader = reader
        self._cancellation = cancellation
        self._hub = hub
        self._streams = streams

    async def GetOperation(
        self, request: pb.GetOperationRequest, context: Any
    ) -> pb.GetOperationResponse:
        operation = await self._reader.operation(caller().tenant_id, request.operation_id)
        return pb.GetOperationResponse(operation=operation)

    async def WaitOperation(
        self, request: pb.WaitOperationRequest, context: Any
    ) -> pb.WaitOperationResponse:
        timeout_s = _DEFAULT_WAIT_S
        if request.HasField("timeout"):
            timeout_s = request.timeout.ToNanoseconds() / 1e9
        operation = await self._reader.wait(caller().tenant_id, request.operation_id, timeout_s)
        return pb.WaitOperationResponse(operation=operation)

    async def ListOperations(
        self, request: pb.ListOperationsRequest, context: Any
    ) -> pb.ListOperationsResponse:
        tenant_id = caller().tenant_id
        if request.run_id:
            self._ledger.run(tenant_id, request.run_id)
        wanted = page(request.page_size, request.page_token)
        rows = await self._store.operations(
            tenant_id, request.run_id or None, list(request.states), wanted
        )
        found = []
        for _, row in rows:
            pending = self._reader.unfinished(tenant_id, row.id)
            found.append(bare_operation(pending.row if pending is not None else row))
        return pb.ListOperationsResponse(
            operations=found,
            next_page_token=token(wanted, len(rows), rows[-1][0] if rows else 0),
        )

    async def CancelOperation(
        self, request: pb.CancelOperationRequest, context: Any
    ) -> pb.CancelOperationResponse:
        tenant_id = caller().tenant_id
        first = await first_request(self._store, tenant_id, request) is None
        pending = self._reader.unfinished(tenant_id, request.operation_id)
        if pending is not None:
            await self._cancellation.cancel(pending)
        operation = await self._reader.operation(tenant_id, request.operation_id)
        if first:
            await self._store.remember(new_request(tenant_id, request, operation.id))
        return pb.CancelOperationResponse(operation=operation)

    async def Watch(
        self, request: pb.WatchRequest, context: Any
    ) -> AsyncIterator[pb.WatchResponse]:
        tenant_id = caller().tenant_id
        if request.run_id:
            self._ledger.run(tenant_id, request.run_id)
        scope = EventScope(
            tenant_id,
            session_id=request.session_id or None,
            run_id=request.run_id or None,
            include_metrics=request.include_metrics,
        )
        cursor = request.cursor if request.HasField("cursor") else None
        async for events, after in self._hub.stream(scope, cursor):
            yield pb.WatchResponse(events=events, cursor=after, first_cursor=self._hub.first_cursor)

    async def StreamSample(
        self, request: pb.StreamSampleRequest, context: Any
    ) -> AsyncIterator[pb.StreamSampleResponse]:
        stream = self._streams.stream(caller().tenant_id, request.operation_id)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response
