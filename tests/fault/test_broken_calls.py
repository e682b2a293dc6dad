"""Callers that hang up while what they asked for is being written: it is done, and nobody else is
kept from hearing of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World
from fault.test_slow_commits import busy_disk

from tensafe_server.operations.runs import RunBook


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=2)
    yield made
    made.close()


def test_a_cancel(world: World):
    run, other = world.next_seq
    world.do(world.cut())
    [cancelled] = submit(world, run, GRADIENT)
    pending = world.coordinator.ledger.pending(cancelled)
    assert pending is not None

    async def hang_up() -> None:
        loop = asyncio.get_running_loop()
        with busy_disk(world):
            cancelling = loop.create_task(world.coordinator.cancellation.cancel(pending))
            sending = loop.create_task(world.submit(other, **GRADIENT))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            cancelling.cancel()
            await asyncio.wait([cancelling])
        await sending

    world.do(hang_up())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["OPERATION_CANCELLED", "WINDOW_POISONED"]
    assert outcomes(world, other) == ["SUCCEEDED"]


async def delete_and_hang_up(world: World, run: str) -> None:
    """The caller is gone before it is on disk that the run is deleted."""
    marking = asyncio.Event()

    class Book(RunBook):
        async def delete(self, *arguments) -> None:
            marking.set()
            await super().delete(*arguments)

    with busy_disk(world):
        deleting = asyncio.get_running_loop().create_task(world.delete_run(run, Book))
        await marking.wait()
        deleting.cancel()
        await asyncio.wait([deleting])


def test_a_deletion(world: World):
    """What waits of the run does not go on."""
    run, other = world.next_seq
    world.do(world.cut())
    submit(world, run, GRADIENT, UPDATE)
    world.do(delete_and_hang_up(world, run))
    submit(world, other, GRADIENT)
    world.finish()
    assert outcomes(world, run) == ["OPERATION_CANCELLED"] * 2
    assert outcomes(world, other) == ["SUCCEEDED"]
