"""What happens to the runs of a worker while it is being greeted, which takes long with many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World, sample
from fault.test_deleted_runs import held


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=2)
    yield made
    made.close()


def greet(world: World, at: int, move: Callable[[str], Awaitable[object]]) -> str:
    """Cuts the worker off and greets it anew; a move is made while its second run is looked at.
    Returns the run that the move was made with: that one, or the first, which it has by then."""
    restorer = world.coordinator.reception._restorer
    catch_up = restorer.catch_up
    seen: list[str] = []
    made_with = []

    async def meanwhile(run, message):
        onward = await catch_up(run, message)
        seen.append(run.id)
        if len(seen) == 2:
            made_with.append(seen[at])
            await move(seen[at])
        return onward

    world.do(world.cut())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restorer, "catch_up", meanwhile)
        world.do(world.connect())
    [run_id] = made_with
    return run_id


@pytest.mark.parametrize("at", [0, 1], ids=["one that it has", "one that is looked at"])
def test_a_run_that_is_deleted_leaves_it(world: World, at: int):
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE)
    world.finish()
    deleted = greet(world, at, world.delete_run)
    world.finish()
    assert held(world) == [run for run in world.next_seq if run != deleted]


def test_a_sample_that_is_cancelled_stops(world: World):
    for run in world.next_seq:
        submit(world, run, GRADIENT, UPDATE, {"sample": sample(5)})
    flow(world)

    async def cancel(run_id: str) -> None:
        [operation] = world.coordinator.ledger.runs[run_id].in_flight
        assert await world.cancel(operation.row.id)
        await asyncio.sleep(0)

    cancelled = greet(world, 0, cancel)
    world.finish()
    ends = {run: outcomes(world, run)[-1] for run in world.next_seq}
    assert ends.pop(cancelled) == "OPERATION_CANCELLED"
    assert list(ends.values()) == ["SUCCEEDED"]
