"""A TCP proxy that disturbs what goes through it: cuts, delays, and replies that never arrive."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_CHUNK_BYTES = 64 * 1024


class TcpProxy:
    """Forwards a loopback port to another one. Its event loop runs in a thread of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._delay_s = 0.0
        self._dropping = False
        self._cutting: tuple[int, Callable[[], bool]] | None = None
        self._passed = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop
        ).result()
        self.port = int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> int:
        """Breaks every connection now; new ones are taken. Returns how many broke."""
        return self._call(self._cut)

    def delay(self, seconds: float) -> None:
        """Holds every piece up for so long, in both directions; 0 ends it."""
        self._call(lambda: setattr(self, "_delay_s", seconds))

    def drop_replies(self) -> None:
        """From now on the server's bytes vanish, while the client's still arrive. Ended by
        `cut`, as a lost reply is noticed when its connection breaks."""
        self._call(lambda: setattr(self, "_dropping", True))

    def cut_every(self, count_bytes: int, again: Callable[[], bool]) -> None:
        """Breaks every connection when so many more bytes have gone through, and calls `again`:
        whether to go on counting."""
        self._call(lambda: setattr(self, "_cutting", (count_bytes, again)))

    def close(self) -> None:
        self._call(self._server.close)
        self._call(self._cut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _cut(self) -> int:
        self._dropping = False
        broken = len(self._writers) // 2
        for writer in list(self._writers):
            writer.transport.abort()
        return broken

    def _count(self, size: int) -> None:
        if self._cutting is None:
            return
        self._passed += size
        count_bytes, again = self._cutting
        if self._passed >= count_bytes:
            self._passed = 0
            if not again():
                self._cutting = None
            self._cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        try:
            await asyncio.gather(
                self._forward(reader, up_writer, replies=False),
                self._forward(up_reader, writer, replies=True),
            )
        finally:
            self._writers -= {writer, up_writer}
            writer.transport.abort()
            up_writer.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                self._count(len(data))
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if replies and self._dropping:
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
