"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_client import ConfigError, Schedule, constant, cosine, linear


def test_constant() -> None:
    assert [constant(2.0)(step) for step in (1, 5, 500)] == [2.0, 2.0, 2.0]
    assert [constant(2.0, warmup_steps=4)(s) for s in (1, 2, 4, 5)] == [0.5, 1.0, 2.0, 2.0]


def test_linear_by_hand() -> None:
    rates = [linear(1.0, total_steps=6, warmup_steps=2)(step) for step in range(1, 9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_cosine_by_hand() -> None:
    schedule = cosine(1.0, total_steps=4, final_learning_rate=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * p / 4)) / 2 for p in range(4)]
    assert [schedule(step) for step in range(1, 5)] == pytest.approx(expected)
    assert schedule(5) == schedule(50) == pytest.approx(0.2)


@given(st.sampled_from(["linear", "cosine"]), st.integers(0, 20), st.integers(1, 50))
def test_rates_rise_to_the_full_one_then_fall_and_no_update_is_wasted(
    kind: str, warmup: int, decay: int
) -> None:
    schedule = Schedule(kind, 3e-4, warmup + decay, warmup)
    rates = [schedule(step) for step in range(1, warmup + decay + 1)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[warmup] == max(rates) == 3e-4
    assert min(rates) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("steps", 1.0),
        ("linear", 1.0),
        ("linear", 1.0, 5, 5),
        ("cosine", 1.0, 5, -1),
        ("constant", 1.0, 5),
    ],
)
def test_bad_schedules(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError):
        Schedule(*arguments)  # type: ignore[arg-type]


def test_updates_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        constant(1.0)(0)
