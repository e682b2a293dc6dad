"""The accountant against plain calls of `dp-accounting`, at parameters that nobody chose."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_server.privacy import accounting
from tensafe_server.privacy.accounting import epsilon, is_exact, most_uses, noise_multiplier
from tensafe_server.privacy.mechanisms import AccountantType, Adjacency, Mechanism, Terms

ACCOUNTANTS = {AccountantType.PLD: PLDAccountant, AccountantType.RDP: RdpAccountant}
TOLERANCES = {AccountantType.PLD: 2e-3, AccountantType.RDP: 1e-3}
BOTH = pytest.mark.parametrize("accountant", ACCOUNTANTS)


def direct(accountant: AccountantType, q: float, sigma: float, steps: int, delta: float) -> float:
    """ε by the library alone."""
    event: Any = dp_accounting.GaussianDpEvent(sigma)
    if q < 1:
        event = dp_accounting.PoissonSampledDpEvent(q, event)
    counted = ACCOUNTANTS[accountant]()
    counted.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return float(counted.get_epsilon(delta))


@BOTH
@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    q=st.floats(1e-4, 0.6) | st.just(1.0),
    sigma=st.floats(0.6, 8.0),
    steps=st.integers(1, 3000),
    log_delta=st.floats(-11, -3),
)
def test_any_parameters(
    accountant: AccountantType, q: float, sigma: float, steps: int, log_delta: float
) -> None:
    delta, tolerance = 10.0**log_delta, TOLERANCES[accountant]
    ours = epsilon({Mechanism(sigma, q): steps}, Terms(delta, accountant))
    assert ours >= direct(accountant, q, sigma, steps, delta) - tolerance
    # What the library's rounding may hide of δ comes on top.
    assert ours <= direct(accountant, q, sigma, steps, delta - steps * 2.0**-52) + tolerance


@BOTH
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.03, 0.4, 1, 1e-5),  # hardly any noise
        (1e-6, 0.7, 100_000, 1e-6),  # a unit is hardly ever drawn
        (0.5, 30.0, 1, 1e-9),  # so much noise that ε is about 0
        (0.999999, 2.0, 10, 1e-5),  # as good as no sampling
        (1.0, 0.5, 1, 1e-5),
        (1.0, 1.0, 1, 0.9),  # δ alone is enough
        (0.02, 1.0, 2, 1e-13),
        (1.0, 3.0, 50, 1e-13),
    ],
)
def test_at_the_edges(
    accountant: AccountantType, q: float, sigma: float, steps: int, delta: float
) -> None:
    ours = epsilon({Mechanism(sigma, q): steps}, Terms(delta, accountant))
    assert ours == pytest.approx(
        direct(accountant, q, sigma, steps, delta), abs=TOLERANCES[accountant]
    )


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "adjacency"),
    [
        (0.02, 0.2, 100, Adjacency.ADD_OR_REMOVE_ONE),
        (0.5, 1.0, 2000, Adjacency.ZERO_OUT),
        (0.02, 0.5, 2000, Adjacency.REPLACE_ONE),
    ],
)
def test_a_grid_stays_small_and_its_epsilon_close(
    q: float, sigma: float, steps: int, adjacency: Adjacency
) -> None:
    """Where the library's own would have millions of points."""
    mechanism, terms = Mechanism(sigma, q), Terms(1e-5, adjacency=adjacency)
    reach = accounting._reach(mechanism, steps, terms)
    assert reach is not None
    assert reach.one / reach.spacing <= 300_000
    assert reach.whole / reach.spacing <= 2_000_000
    assert reach.spacing > 1e-4
    ours = epsilon({mechanism: steps}, terms)
    finer = accounting._pld_epsilon(
        mechanism, steps, terms, accounting._Reach(reach.one / 2, reach.whole / 2)
    )
    assert finer - 1e-9 <= ours <= finer * (1 + 1e-4)


@pytest.mark.parametrize(
    ("steps", "delta"), [(1000, 1e-12), (100_000, 1e-9), (100_000, 1e-10), (100_000, 1e-13)]
)
def test_rounding_of_many_steps_hides_nothing(steps: int, delta: float) -> None:
    """The library's own PLD tells less than the truth there, since it adds up by a Fourier
    transform: at 100,000 steps 24.5665 for 24.5697 at δ = 1e-10, and 27.391 for 27.723 at 1e-13."""
    sigma = math.sqrt(steps / 10)
    exact = epsilon({Mechanism(sigma): steps}, Terms(delta))  # in closed form
    as_good_as_all = Mechanism(sigma, 1 - 1e-6)  # which is worth less than 1e-5 of ε
    ours = epsilon({as_good_as_all: steps}, Terms(delta))
    assert exact * (1 - 1e-5) <= ours < 1.1 * exact
    assert is_exact({as_good_as_all: steps}, Terms(delta)) == (delta >= steps * 2.0**-51)


@BOTH
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-12, 1e-30])
def test_beyond_the_edges(accountant: AccountantType, delta: float) -> None:
    terms = Terms(delta, accountant)
    for q in (1e-3, 1.0):
        assert epsilon({Mechanism(0.0, q): 1}, terms) == math.inf
        assert epsilon({Mechanism(0.0, q): 0}, terms) == 0.0
        assert epsilon({Mechanism(1.0, q): 0}, terms) == 0.0
        assert most_uses({}, Mechanism(0.0, q), 8.0, terms) == 0
    assert epsilon({Mechanism(1.0, 0.0): 10**6}, terms) == 0.0
    # A δ below what an accountant can tell is never taken for a larger one.
    tiny = epsilon({Mechanism(1.0, 0.01): 100}, terms)
    assert tiny >= epsilon({Mechanism(1.0, 0.01): 100}, Terms(1e-3, accountant))


@BOTH
@pytest.mark.parametrize(
    ("q", "sigma", "target", "delta"),
    [
        (0.022, 0.9, 8.0, 1e-5),
        (0.1, 2.0, 1.5, 1e-6),
        (0.005, 0.7, 4.0, 1e-7),
        (0.4, 6.0, 3.0, 1e-5),
        (1.0, 5.0, 4.0, 1e-5),
        (1.0, 20.0, 8.0, 1e-9),
    ],
)
def test_the_most_steps_are_right_by_one(
    accountant: AccountantType, q: float, sigma: float, target: float, delta: float
) -> None:
    terms = Terms(delta, accountant)
    most = most_uses({}, Mechanism(sigma, q), target, terms)
    assert most > 0
    assert direct(accountant, q, sigma, most, delta) <= target + 1e-9
    assert direct(accountant, q, sigma, most + 1, delta) > target - 1e-9


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize(
    ("q", "steps", "target", "delta"),
    [(0.022, 40, 8.0, 1e-5), (0.1, 300, 1.0, 1e-6), (1.0, 7, 2.0, 1e-5)],
)
def test_the_least_noise_for_a_target(
    accountant: AccountantType, q: float, steps: int, target: float, delta: float
) -> None:
    sigma = noise_multiplier(target, steps, Terms(delta, accountant), q)
    assert direct(accountant, q, sigma, steps, delta) <= target + 1e-9
    assert direct(accountant, q, sigma - 1e-3, steps, delta) > target


def test_sampled_releases_that_differ() -> None:
    """By RDP, whatever is asked for: all of them count."""
    used = {(0.01, 1.0): 500, (0.02, 1.5): 300, (1.0, 20.0): 40}
    counted = RdpAccountant()
    for (q, sigma), steps in used.items():
        event = dp_accounting.GaussianDpEvent(sigma)
        counted.compose(dp_accounting.PoissonSampledDpEvent(q, event), steps)
    mixed = {Mechanism(sigma, q): steps for (q, sigma), steps in used.items()}
    for accountant in ACCOUNTANTS:
        found = epsilon(mixed, Terms(1e-5, accountant))
        assert found == pytest.approx(counted.get_epsilon(1e-5), abs=1e-3)
