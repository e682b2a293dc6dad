"""The session's one Watch stream, which resolves its futures by push.

After a break it goes on from its cursor, for ever; nothing that finished meanwhile is missed. If
the server was started anew meanwhile, it is asked whether it still has what it had accepted: a disk
may have lost that. The stream stands before the first operation is submitted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from tensafe.v1 import operations_pb2 as pb
from tensafe_client.backoff import Backoff
from tensafe_client.errors import ClientClosedError, TenSafeError, from_rpc_error, unexpected
from tensafe_client.inquiry import Inquiry

if TYPE_CHECKING:
    from tensafe_client.session import Session

# No later attempt can succeed where one was refused for one of these.
_PERMANENT = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }
)


class Watcher:
    """Keeps the stream up and hands what it brings to the session."""

    def __init__(self, session: Session, inquiry: Inquiry) -> None:
        self._session = session
        self._inquiry = inquiry
        self._cursor: int | None = None
        self._lost_place = False
        self._server = 0  # `first_cursor` of the server that has what it accepted, as it has said
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def ready(self) -> None:
        """Returns once the stream has stood: from then on every end of an operation arrives.

        Raises:
            TenSafeError: if the server refuses the stream.
        """
        if self._task is None or self._task.done():
            self._cursor, self._lost_place, self._server = None, False, 0
            self._task = asyncio.get_running_loop().create_task(self._run(), name="tensafe-watch")
        task = self._task
        while self._cursor is None:
            self._changed.clear()
            await self._changed.wait()
            if task.done() or self._session.watch_error is not None:
                raise self._session.watch_error or ClientClosedError("the client was closed")

    def stop(self) -> None:
        """Ends the stream."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        self._session.watch_error = None
        try:
            await self._stay_connected()
        except TenSafeError as error:
            self._end(error)
        except Exception as error:  # whatever it is, futures must not wait for a stream that ended
            self._end(unexpected("watching the operations", error))
        finally:
            self._changed.set()

    def _end(self, error: TenSafeError) -> None:
        self._session.watch_error = error
        self._session.fail_all(error)

    async def _stay_connected(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as error:
                if error.code() in _PERMANENT:
                    raise from_rpc_error(error) from None
                if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                    # The server no longer knows our cursor: begin anew, and ask for what we miss.
                    self._cursor, self._lost_place = None, True
            await asyncio.sleep(backoff.next_s())

    async def _stream(self, backoff: Backoff) -> None:
        stubs = await self._session.stubs()
        request = pb.WatchRequest(session_id=self._session.session_id, cursor=self._cursor)
        call = stubs.operations.Watch(request, metadata=self._session.metadata)
        try:
            async for response in call:
                self._cursor = response.cursor
                if not self._changed.is_set():
                    self._changed.set()
                for event in response.events:
                    if event.WhichOneof("event") == "operation":
                        self._session.operations.finished(event.operation)
                if self._lost_place or response.first_cursor != self._server:
                    await self._make_sure(response.first_cursor)
                backoff.reset()
        finally:
            call.cancel()  # grpc.aio does not cancel a call that is merely dropped

    async def _make_sure(self, server: int) -> None:
        """Asks for what this stream may not tell of."""
        if self._lost_place:
            await self._inquiry.reconcile()
        elif self._server:
            await self._inquiry.find_lost()
        self._lost_place, self._server = False, server
