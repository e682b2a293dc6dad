"""A worker's stream breaks while it is being greeted: what it was given back goes on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World

from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.reception import Reception


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=2)
    yield made
    made.close()


async def greet_and_break(world: World, then: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Its stream breaks when it has been given one of two runs back. The other one follows, after
    the event that `then` sets."""
    reception: Reception = world.coordinator.reception
    catch_up = reception._restorer.catch_up
    second, go_on = asyncio.Event(), asyncio.Event()
    seen = []

    async def slow(run, held):
        seen.append(run)
        if len(seen) == 2:
            second.set()
            await go_on.wait()
        return await catch_up(run, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reception._restorer, "catch_up", slow)
        register = world.worker.register()
        greeting = asyncio.get_running_loop().create_task(reception.arrive(register))
        await second.wait()
        greeting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await greeting
        await then(go_on)
        await world._settle()


def test_its_runs_go_on_when_it_is_back(world: World):
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    world.do(world.cut())

    async def go_on(event: asyncio.Event) -> None:
        event.set()

    world.do(greet_and_break(world, go_on))
    assert world.coordinator.dispatcher.links == []
    assert [run.worker_id for run in world.coordinator.ledger.runs.values()] == [None, None]
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert [outcomes(world, run) for run in world.next_seq] == [["SUCCEEDED"] * 4] * 2


def test_a_worker_that_is_back_before_its_greeting_ended_keeps_what_it_has(world: World):
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    for run in world.next_seq:
        submit(world, run, GRADIENT)
    world.do(world.deliver())
    world.do(world.cut())

    async def come_back(event: asyncio.Event) -> None:
        back = asyncio.get_running_loop().create_task(world.connect())
        for _ in range(10):
            await asyncio.sleep(0)
        event.set()
        await back

    world.do(greet_and_break(world, come_back))
    runs = world.coordinator.ledger.runs.values()
    assert [run.worker_id for run in runs] == [world.hosts[0].link.id] * 2
    assert [len(run.in_flight[0].losses) for run in runs] == [0, 0]
    world.finish()
    assert [outcomes(world, run) for run in world.next_seq] == [["SUCCEEDED"] * 3] * 2
    assert [run.epoch for run in runs] == [1, 1], "no replay"


def test_a_run_that_cannot_be_given_back_is_restored_and_keeps_nobody_away(world: World):
    reception: Reception = world.coordinator.reception
    first, _ = world.next_seq
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    world.do(world.cut())
    catch_up = reception._restorer.catch_up

    async def broken(run, held):
        if run.id == first:
            raise OSError("too many open files")
        return await catch_up(run, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reception._restorer, "catch_up", broken)
        world.do(world.connect())
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert [outcomes(world, run) for run in world.next_seq] == [["SUCCEEDED"] * 4] * 2
    assert [run.epoch for run in world.coordinator.ledger.runs.values()] == [2, 1]


def test_while_the_store_cannot_be_written_a_worker_keeps_what_it_has(world: World):
    reception: Reception = world.coordinator.reception
    _, second = world.next_seq
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    world.do(world.cut())
    catch_up = reception._restorer.catch_up

    async def locked(run, held):
        if run.id == second:
            raise TenSafeFault("STORAGE_UNAVAILABLE", "another process holds a lock")
        return await catch_up(run, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reception._restorer, "catch_up", locked)
        with pytest.raises(TenSafeFault, match="holds a lock"):
            world.do(world.connect())
    assert [run.worker_id for run in world.coordinator.ledger.runs.values()] == [None, None]
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert [outcomes(world, run) for run in world.next_seq] == [["SUCCEEDED"] * 4] * 2
    assert [run.epoch for run in world.coordinator.ledger.runs.values()] == [1, 1], "no replay"
