"""Streams of the I/O loop, iterated from other threads and loops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TypeVar, cast

from tensafe_client.io_loop import IoLoop

T = TypeVar("T")


def iterate(io: IoLoop, source: AsyncIterator[list[T]]) -> Iterator[T]:
    """Iterates a stream of the loop from a thread; leaving the iteration ends the stream."""
    try:
        while (items := io.run(_next(source))) is not None:
            yield from items
    finally:
        io.run(_close(source))


async def iterate_async(io: IoLoop, source: AsyncIterator[list[T]]) -> AsyncGenerator[T, None]:
    """Iterates a stream of the loop from another event loop."""
    try:
        while (items := await io.bridge(_next(source))) is not None:
            for item in items:
                yield item
    finally:
        await io.bridge(_close(source))


async def _next(source: AsyncIterator[list[T]]) -> list[T] | None:
    return await anext(source, None)


async def _close(source: AsyncIterator[list[T]]) -> None:
    await cast(AsyncGenerator[list[T], None], source).aclose()
