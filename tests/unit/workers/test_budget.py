"""The budget of tokens follows the memory, down at once and up with care."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.budget import TokenBudget

MOST = 65_536


def train(budget: TokenBudget, room: int, passes: int, fill: float = 1.0) -> tuple[int, int]:
    """Runs passes that fill so much of the budget on a device with room for so many tokens;
    returns how many failed, and the tokens of those that fitted."""
    failed = trained = 0
    for _ in range(passes):
        used = math.ceil(fill * budget.tokens)
        if used > room:
            budget.halve(used)
            failed += 1
        else:
            budget.fitted([used])
            trained += used
    return failed, trained


@settings(deadline=None)
@given(
    most=st.integers(1, MOST),
    rooms=st.lists(st.tuples(st.integers(1, MOST), st.integers(1, 300)), max_size=6),
    fill=st.floats(0.51, 1),
)
def test_it_stays_within_its_bounds_and_is_whole_again_when_there_is_room(
    most: int, rooms: list[tuple[int, int]], fill: float
):
    budget = TokenBudget(most)
    for room, passes in rooms:
        for _ in range(passes):
            train(budget, room, 1, fill)
            assert 1 <= budget.tokens <= most
    # From 1 to `most` by half each time; the one size that failed is waited for longest.
    failed, _ = train(budget, most, 4096 + 32 * 32, fill)
    assert failed == 0
    assert budget.tokens == most
    assert TokenBudget.fixed == budget.fixed == 2048, "deterministic runs are cut as ever"


@settings(deadline=None)
@given(most=st.integers(64, MOST), share=st.floats(0.02, 0.99))
def test_trying_costs_next_to_nothing(most: int, share: float):
    room = max(1, int(share * most))
    budget = TokenBudget(most)
    train(budget, room, 500)
    failed, trained = train(budget, room, 20_000)
    assert failed <= 20
    assert trained >= 0.45 * room * 20_000


def test_small_passes_show_nothing():
    budget = TokenBudget(1000)
    budget.halve(1000)
    for _ in range(10_000):
        budget.fitted([250, 3])
    assert budget.tokens == 500


@pytest.mark.parametrize(("passes", "tokens"), [(31, 500), (32, 750), (63, 750), (64, 1000)])
def test_it_grows_by_half_after_32_passes_that_fit(passes: int, tokens: int):
    budget = TokenBudget(1000)
    budget.halve(1000)
    train(budget, 1000, passes)
    assert budget.tokens == tokens


def test_a_size_that_fails_again_is_waited_for_twice_as_long():
    budget = TokenBudget(1000)
    waited = []
    for _ in range(10):
        budget.halve(budget.tokens)
        passes = 0
        while budget.tokens < 1000:
            budget.fitted([budget.tokens])
            passes += 1
        waited.append(passes)
    longest = [4096, 4096, 4096]
    assert waited == [32 + patience for patience in (32, 64, 128, 256, 512, 1024, 2048, *longest)]
