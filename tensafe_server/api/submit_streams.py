"""Streams of requests that stay open between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from tensafe.wire.status import TenSafeFault
from tensafe_server.api.guard import caller, unauthenticated
from tensafe_server.tenants.identity import Identity

T = TypeVar("T")


class RequestStreams:
    """The streams that are open. A request counts as long as the key does that its stream was
    opened with; a server that stops ends the streams that wait."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._waiting: set[asyncio.Task[None]] = set()
        self._closed: TenSafeFault | None = None

    def close(self, fault: TenSafeFault) -> None:
        """Ends the streams that wait for their next request, and the others when they come to."""
        self._closed = fault
        for task in self._waiting:
            task.cancel()

    async def each(self, requests: AsyncIterator[T]) -> AsyncIterator[T]:
        """The requests of a call, in the task that serves it.

        Raises:
            TenSafeFault: UNAUTHENTICATED if the key was revoked, or what `close` was called with.
        """
        task = asyncio.current_task()
        assert task is not None
        while True:
            if self._closed is not None:
                raise self._closed
            self._waiting.add(task)
            try:
                request = await anext(requests, None)
            except asyncio.CancelledError:
                if self._closed is None:
                    raise  # the caller is gone
                task.uncancel()
                raise self._closed from None
            finally:
                self._waiting.discard(task)
            if request is None:
                return
            if self._identity.is_revoked(caller().key_id):
                raise unauthenticated("the API key was revoked")
            yield request
