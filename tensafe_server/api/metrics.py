"""MetricsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from tensafe.v1 import metrics_pb2 as pb
from tensafe.v1 import metrics_pb2_grpc as rpc
from tensafe_server.api.guard import caller
from tensafe_server.events.hub import EventHub
from tensafe_server.operations.ledger import Ledger
from tensafe_server.store.base import EventScope


class MetricsServicer(rpc.MetricsServiceServicer):
    def __init__(self, ledger: Ledger, hub: EventHub) -> None:
        self._ledger = ledger
        self._hub = hub

    async def StreamMetrics(
        self, request: pb.StreamMetricsRequest, context: Any
    ) -> AsyncIterator[pb.StreamMetricsResponse]:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        scope = EventScope(
            run.tenant_id, run_id=run.id, include_metrics=True, include_operations=False
        )
        follow = request.follow and not run.deleted
        async for events, cursor in self._hub.stream(scope, request.since, follow=follow):
            yield pb.StreamMetricsResponse(
                metrics=[event.metrics for event in events], cursor=cursor
            )
