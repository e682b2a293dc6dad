"""Streams of a sample's tokens: what was drawn so far, what is drawn, and at the end the result."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

from tensafe.v1 import operations_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.lookup import OperationReader, draining
from tensafe_server.operations.model import PendingOperation
from tensafe_server.operations.transcripts import Place, RowKey, Transcript, ended_transcript
from tensafe_server.operations.validation import refused

_PAGE_BYTES = 2**20
_RETRY_S = 0.5


class SampleStreams:
    """Serves readers of samples.

    Args:
        most: streams that one tenant may have open.
    """

    def __init__(self, reader: OperationReader, most: int) -> None:
        self._reader = reader
        self._most = most
        self._tenants: Counter[str] = Counter()
        self._open: set[asyncio.Event] = set()
        self._closed = False

    def close(self) -> None:
        """Sends all readers away; they come back to the next coordinator and begin anew."""
        self._closed = True
        for wake in self._open:
            wake.set()

    async def stream(
        self, tenant_id: str, operation_id: str
    ) -> AsyncGenerator[pb.StreamSampleResponse]:
        """Yields every token of every completion once, then the operation.

        Raises:
            TenSafeFault: OPERATION_NOT_FOUND; INVALID_ARGUMENT for an operation that is no sample;
                QUEUE_FULL if the tenant has too many open; DRAINING.
        """
        operation = await self._reader.operation(tenant_id, operation_id)
        if operation.kind != pb.OPERATION_KIND_SAMPLE:
            raise refused([("operation_id", "must be a SAMPLE's; no other operation has tokens")])
        with self._counted(tenant_id):
            async with aclosing(self._pages(tenant_id, operation_id, operation)) as pages:
                async for page in pages:
                    yield page

    @contextmanager
    def _counted(self, tenant_id: str) -> Iterator[None]:
        if self._tenants[tenant_id] >= self._most:
            raise TenSafeFault(
                "QUEUE_FULL",
                f"tenants/{tenant_id} has {self._most} token streams open; end some, or wait for "
                "the results of samples without streaming",
                retry_delay_s=_RETRY_S,
                limit="tenant_streams",
                limit_value=self._most,
                resource=f"tenants/{tenant_id}",
            )
        self._tenants[tenant_id] += 1
        try:
            yield
        finally:
            self._tenants[tenant_id] -= 1
            if not self._tenants[tenant_id]:
                del self._tenants[tenant_id]

    async def _pages(
        self, tenant_id: str, operation_id: str, operation: pb.Operation
    ) -> AsyncGenerator[pb.StreamSampleResponse]:
        places: dict[RowKey, Place] = {}
        pending = self._reader.unfinished(tenant_id, operation_id)
        if pending is not None:
            async with aclosing(self._drawn(pending, places)) as pages:
                async for chunks in pages:
                    yield pb.StreamSampleResponse(chunks=chunks)
            operation = await self._reader.operation(tenant_id, operation_id)
        before = pending.transcript if pending is not None else None
        whole = ended_transcript(operation.result.sample, before, places)
        for chunks in whole.since(places, _PAGE_BYTES):
            yield pb.StreamSampleResponse(chunks=chunks)
        yield pb.StreamSampleResponse(operation=operation)

    async def _drawn(
        self, pending: PendingOperation, places: dict[RowKey, Place]
    ) -> AsyncGenerator[Sequence[pb.TokenChunk]]:
        """What is drawn until the operation has ended."""
        if pending.transcript is None:
            pending.transcript = Transcript()
        transcript, wake = pending.transcript, asyncio.Event()
        ended = pending.wait_finished()
        ended.add_done_callback(lambda _: wake.set())
        transcript.readers.add(wake)
        self._open.add(wake)
        try:
            while not ended.done():
                if self._closed:
                    raise draining()
                wake.clear()
                for chunks in transcript.since(places, _PAGE_BYTES):
                    yield chunks
                await wake.wait()
        finally:
            transcript.readers.discard(wake)
            self._open.discard(wake)
