"""Workers that are cut off while they are at an operation, and come back: none of them was lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=1, workers=3)
    yield made
    made.close()


def begin(world: World, run: str) -> int:
    """Whoever the run was given to begins with what is next of it, and says so; its number."""
    state = world.coordinator.ledger.runs[run]
    [at] = [
        at
        for at, host in enumerate(world.hosts)
        if host.link is not None and host.link.id == state.worker_id
    ]
    world.do(world.deliver(at))
    world.hosts[at].worker.begin()
    world.do(world.report(at))
    return at


@pytest.mark.parametrize("back", ["one", "both", "with the coordinator"])
def test_what_two_workers_were_cut_off_with_is_not_failed(world: World, run: str, back: str):
    submit(world, run, GRADIENT, UPDATE)
    ats = []
    for _ in range(2):
        ats.append(begin(world, run))
        world.do(world.cut(ats[-1]))
    assert outcomes(world, run) == []
    if back == "with the coordinator":
        world.do(world.restart())
    for at in ats[: 1 if back == "one" else 2]:
        world.do(world.connect(at))
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 2
    assert world.do(world.store.attempts()) == []


def test_it_fails_once_it_is_certain_that_both_are_lost(world: World, run: str):
    submit(world, run, GRADIENT, UPDATE)
    for _ in range(2):
        world.do(world.cut(begin(world, run)))
    submit(world, run, GRADIENT)
    assert world.coordinator.ledger.runs[run].worker_id is None, "nobody gets it meanwhile"
    world.do(world.judge())
    world.finish()
    assert outcomes(world, run) == ["INTERNAL", "WINDOW_POISONED", "SUCCEEDED"]


def test_a_worker_started_anew_under_the_same_name_says_that_it_was_lost(world: World, run: str):
    submit(world, run, GRADIENT)
    first = begin(world, run)
    world.do(world.cut(first))
    world.do(world.kill_worker(begin(world, run)))
    assert outcomes(world, run) == []
    world.do(world.kill_worker(first))
    assert outcomes(world, run) == ["INTERNAL"]
