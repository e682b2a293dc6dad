"""Poisson draws: their rate, their independence, and that they come from no seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensafe_server.privacy import drawing
from tensafe_server.privacy.drawing import draw

UNITS, RATE, DRAWS = 200, 0.1, 4000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """bool [DRAWS, UNITS]."""
    found = np.zeros((DRAWS, UNITS), bool)
    for row in found:
        row[draw(UNITS, RATE)] = True
    return found


def test_every_unit_is_drawn_at_the_rate(drawn: np.ndarray) -> None:
    deviation = np.sqrt(RATE * (1 - RATE) / DRAWS)
    assert abs(drawn.mean() - RATE) < 5 * deviation / np.sqrt(UNITS)
    assert np.abs(drawn.mean(axis=0) - RATE).max() < 5 * deviation


def test_sizes_vary_as_those_of_independent_draws_do(drawn: np.ndarray) -> None:
    sizes = drawn.sum(axis=1)
    expected = UNITS * RATE * (1 - RATE)
    # The variance of a variance over n draws is about 2 σ⁴ / n.
    assert abs(sizes.var() - expected) < 6 * expected * np.sqrt(2 / DRAWS)


def test_units_and_steps_are_independent(drawn: np.ndarray) -> None:
    values = (drawn - RATE) / np.sqrt(RATE * (1 - RATE))
    between_units = values.T @ values / DRAWS
    np.fill_diagonal(between_units, 0)
    assert np.abs(between_units).max() < 6 / np.sqrt(DRAWS)
    between_steps = (values[1:] * values[:-1]).mean()
    assert abs(between_steps) < 6 / np.sqrt(DRAWS * UNITS)


def test_edges() -> None:
    assert draw(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert draw(0, 0.5).tolist() == []
    assert draw(5, 1e-18).tolist() == []


def test_large_datasets_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_AT_ONCE", 16)
    found = draw(1000, 0.5)
    assert (np.diff(found) > 0).all()
    assert 400 < len(found) < 600
    assert found.max() > 980


def test_only_tests_have_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, same, other = (draw(500, 0.2, (7, purpose)).tolist() for purpose in ("a", "a", "b"))
    assert one == same != other
    asked: list[int] = []
    real = drawing.os.urandom
    monkeypatch.setattr(drawing.os, "urandom", lambda n: asked.append(n) or real(n))
    draws = [draw(500, 0.2).tolist() for _ in range(4)]
    assert asked == [4000] * 4
    assert all(a != b for a, b in itertools.combinations(draws, 2))
