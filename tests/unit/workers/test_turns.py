"""How training and sampling share a worker."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.turns import Turns

TURN_S = st.floats(1e-4, 5)


@settings(deadline=None)
@given(st.lists(TURN_S, min_size=1), st.lists(TURN_S, min_size=1))
def test_neither_gets_ahead_by_more_than_its_longest_turn(training, sampling):
    """As long as both have work, whatever their turns take."""
    turns, spent = Turns(), {"training": 0.0, "sampling": 0.0}
    waiting = {"training": list(training), "sampling": list(sampling)}
    while all(waiting.values()):
        trains = turns.training_is_next(trains=True, samples=True)
        seconds = waiting["training" if trains else "sampling"].pop()
        (turns.trained if trains else turns.sampled)(seconds)
        spent["training" if trains else "sampling"] += seconds
        ahead_s = spent["training"] - spent["sampling"]
        assert -max(sampling) - 1e-6 <= ahead_s <= max(training) + 1e-6


def test_nobody_saves_up_time_while_the_other_has_nothing_to_do():
    turns = Turns()
    for _ in range(5):
        assert turns.training_is_next(trains=True, samples=False)
        turns.trained(1.0)
    assert turns.training_is_next(trains=True, samples=True)
    turns.trained(0.1)
    assert not turns.training_is_next(trains=True, samples=True)
    turns.sampled(0.2)
    assert turns.training_is_next(trains=True, samples=True)
    assert not turns.training_is_next(trains=False, samples=True)
