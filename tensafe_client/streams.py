"""Streams of the I/O loop, iterated from other threads and loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Generic, TypeVar

from tensafe_client.io_loop import IoLoop

T = TypeVar("T")


class Source(Generic[T]):
    """A generator of the loop; closing it waits for a step that is being cancelled."""

    def __init__(self, generator: AsyncGenerator[list[T], None]) -> None:
        self._generator = generator
        self._one_at_a_time = asyncio.Lock()

    async def next(self) -> list[T] | None:
        """What comes next; None at the end."""
        async with self._one_at_a_time:
            return await anext(self._generator, None)

    async def close(self) -> None:
        """Ends the generator."""
        async with self._one_at_a_time:
            await self._generator.aclose()


def iterate(io: IoLoop, generator: AsyncGenerator[list[T], None]) -> Iterator[T]:
    """Iterates a stream of the loop from a thread; leaving the iteration ends the stream."""
    source = Source(generator)
    try:
        while (items := io.run(source.next())) is not None:
            yield from items
    finally:
        io.run(source.close())


async def iterate_async(
    io: IoLoop, generator: AsyncGenerator[list[T], None]
) -> AsyncGenerator[T, None]:
    """Iterates a stream of the loop from another event loop."""
    source = Source(generator)
    try:
        while (items := await io.bridge(source.next())) is not None:
            for item in items:
                yield item
    finally:
        await io.bridge(source.close())
