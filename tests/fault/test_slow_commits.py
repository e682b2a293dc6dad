"""An outcome that was told and is not on disk yet: nobody acts as if it had never come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World

from tensafe_server.operations.model import PendingOperation


@contextmanager
def busy_disk(world: World) -> Iterator[threading.Event]:
    """Nothing is committed before the event is set."""
    free = threading.Event()
    world.store._writer.submit(lambda _: free.wait(30) and None)
    try:
        yield free
    finally:
        free.set()


def test_a_recovery_has_what_is_on_its_way_to_the_disk(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    """Whoever reads the log sooner replays a run without it, and it is not executed again."""
    submit(world, run, GRADIENT, UPDATE)
    flow(world)
    submit(world, run, GRADIENT)
    world.do(world.deliver())
    while world.worker.execute():
        pass
    submit(world, run, UPDATE)
    read_early: list[bool] = []
    wait_finished, history = PendingOperation.wait_finished, world.store.history

    async def told_and_lost() -> None:
        with monkeypatch.context() as patch, busy_disk(world) as free:

            def wait(operation: PendingOperation):
                free.set()
                return wait_finished(operation)

            async def read(*arguments, **options):
                read_early.append(not free.is_set())
                free.set()
                return await history(*arguments, **options)

            patch.setattr(PendingOperation, "wait_finished", wait)
            patch.setattr(world.store, "history", read)
            await world.report()
            await world.kill_worker()
            await world._settle()

    world.do(told_and_lost())
    assert read_early
    assert not any(read_early)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 4


def test_a_recovery_waits_for_several_that_reach_the_disk_together(world: World, run: str):
    submit(world, run, GRADIENT, UPDATE)
    world.do(world.deliver())
    while world.worker.execute():
        pass
    submit(world, run, GRADIENT)

    async def tell_and_die() -> None:
        with busy_disk(world):
            await world.report()
            await world.kill_worker()
            for _ in range(20):
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await world._settle()

    world.do(tell_and_die())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 4


def test_a_worker_that_is_back_before_what_it_told_is_on_disk_keeps_its_run(world: World, run: str):
    submit(world, run, GRADIENT)
    world.do(world.deliver())
    while world.worker.execute():
        pass

    async def tell_and_come_back() -> None:
        with busy_disk(world):
            await world.report()
            await world.cut()
            back = asyncio.get_running_loop().create_task(world.connect())
            for _ in range(10):
                await asyncio.sleep(0)
        await back

    world.do(tell_and_come_back())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 2
    assert world.coordinator.ledger.runs[run].epoch == 1, "no replay"


def test_a_worker_has_its_credit_back_once_the_outcome_is_on_disk(world: World, run: str):
    """It remembers as many outcomes as it has credits, and may be asked for those that are not."""
    [operation] = submit(world, run, GRADIENT)
    world.do(world.deliver())
    while world.worker.execute():
        pass
    link = world.link
    assert link is not None

    async def tell() -> None:
        with busy_disk(world):
            await world.report()
            assert operation in link.outstanding

    world.do(tell())
    assert operation not in link.outstanding
