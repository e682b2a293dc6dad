"""The accountant against published values, exact Gaussians and itself."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_server.privacy.accounting import (
    MOST_STEPS,
    UnsupportedCompositionError,
    epsilon,
    is_exact,
    most_uses,
    noise_multiplier,
)
from tensafe_server.privacy.mechanisms import (
    AccountantType,
    Adjacency,
    Mechanism,
    Terms,
    joint_noise_multiplier,
)

PLD, RDP = AccountantType.PLD, AccountantType.RDP

# (q, σ, steps, δ) → ε by PLD and by RDP.
KNOWN = [
    (0.01, 1.0, 1000, 1e-5, 1.8282, 2.1014),
    (256 / 60000, 1.1, 14062, 1e-5, 2.3817, 2.5966),
    (0.004, 0.8, 5000, 1e-5, 2.4991, 2.9252),
    (0.02, 0.5, 200, 1e-5, 12.2040, 14.3580),
    (0.1, 5.0, 1000, 1e-5, 2.6507, 2.8796),
    (1.0, 10.0, 100, 1e-5, 4.3772, 4.7285),
    (0.008, 0.9, 1, 1e-5, 0.2283, 1.1474),
    (0.0025, 1.3, 6000, 1e-5, 0.6401, 0.7242),  # TensorFlow Privacy's .72422
    (0.001, 1.0, 30000, 1e-7, 1.0982, 1.4155),  # TensorFlow Privacy's 1.41550
    (0.0128, 1.5, 2344, 1e-5, 1.8925, 2.0696),
    (0.04, 1.5, 2250, 1e-5, 6.7688, 7.3291),  # Opacus's published RDP
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp"), KNOWN)
def test_known_answers(
    q: float, sigma: float, steps: int, delta: float, pld: float, rdp: float
) -> None:
    used = {Mechanism(sigma, q): steps}
    assert epsilon(used, Terms(delta, PLD)) == pytest.approx(pld, abs=2e-3)
    assert epsilon(used, Terms(delta, RDP)) == pytest.approx(rdp, abs=1e-3)


def test_what_no_sampling_assumption_costs() -> None:
    """1,000 steps at q = 0.01, σ = 1: 1.828 if drawn by Poisson sampling; 17.857 if all that is
    known is that an example was used at most 10 times."""
    terms = Terms(1e-5)
    assert epsilon({Mechanism(1.0, 0.01): 1000}, terms) == pytest.approx(1.828, abs=2e-3)
    assert epsilon({Mechanism(1.0): 10}, terms) == pytest.approx(17.857, abs=2e-3)


@pytest.mark.parametrize(
    ("adjacency", "expected"),
    [
        (Adjacency.ADD_OR_REMOVE_ONE, 1.828),
        (Adjacency.ZERO_OUT, 1.828),
        (Adjacency.REPLACE_ONE, 2.843),
    ],
)
def test_adjacencies(adjacency: Adjacency, expected: float) -> None:
    terms = Terms(1e-5, PLD, adjacency)
    assert epsilon({Mechanism(1.0, 0.01): 1000}, terms) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("accountant", [PLD, RDP])
def test_replacing_a_unit_doubles_a_gaussians_sensitivity(accountant: AccountantType) -> None:
    """Under RDP the library itself gives both relations the same number."""
    one = epsilon({Mechanism(2.0): 7}, Terms(1e-5, accountant, Adjacency.REPLACE_ONE))
    other = epsilon({Mechanism(1.0): 7}, Terms(1e-5, accountant))
    assert one == pytest.approx(other, rel=1e-9)


def test_rdp_of_a_sampled_replacement_is_refused_not_guessed() -> None:
    terms = Terms(1e-5, RDP, Adjacency.REPLACE_ONE)
    with pytest.raises(UnsupportedCompositionError, match="replace_one"):
        epsilon({Mechanism(1.0, 0.01): 10}, terms)
    mixed = {Mechanism(1.0, 0.01): 10, Mechanism(2.0, 0.01): 10}
    with pytest.raises(UnsupportedCompositionError, match="replace_one"):
        epsilon(mixed, Terms(1e-5, PLD, Adjacency.REPLACE_ONE))


@pytest.mark.parametrize("accountant", [PLD, RDP])
def test_edges(accountant: AccountantType) -> None:
    terms = Terms(1e-5, accountant)
    assert epsilon({Mechanism(0.0, 0.01): 1}, terms) == math.inf
    assert epsilon({Mechanism(0.0, 0.01): 0}, terms) == 0
    assert epsilon({Mechanism(1.0, 0.0): 1000}, terms) == 0
    assert epsilon({Mechanism(0.0, 0.0): 1000}, terms) == 0
    assert epsilon({}, terms) == 0


@pytest.mark.parametrize(
    ("target", "q", "steps", "accountant", "sigma"),
    [
        (3.0, 0.01, 1000, PLD, 0.8137),
        (3.0, 0.01, 1000, RDP, 0.8646),
        (8.0, 0.04, 2000, PLD, 1.2901),
        (8.0, 0.04, 2000, RDP, 1.3562),
    ],
)
def test_sigma_for_a_target(
    target: float, q: float, steps: int, accountant: AccountantType, sigma: float
) -> None:
    terms = Terms(1e-5, accountant)
    found = noise_multiplier(target, steps, terms, q)
    assert found == pytest.approx(sigma, abs=3e-4)
    assert epsilon({Mechanism(found, q): steps}, terms) <= target


def test_sigma_without_amplification() -> None:
    """ε 1.828 in 10 uses without sampling needs σ = 6.83."""
    assert noise_multiplier(1.828, 10, Terms(1e-5)) == pytest.approx(6.83, abs=5e-3)


def test_sigma_of_a_generous_target_is_small_and_still_enough() -> None:
    terms = Terms(1e-5)
    found = noise_multiplier(1e4, 1, terms)
    assert found < 0.02
    assert epsilon({Mechanism(found): 1}, terms) <= 1e4


def test_sigma_makes_up_for_what_was_released_before() -> None:
    terms = Terms(1e-5)
    before = {Mechanism(4.0): 20}
    found = noise_multiplier(5.0, 10, terms, before=before)
    assert found > noise_multiplier(5.0, 10, terms)
    assert 4.99 < epsilon({**before, Mechanism(found): 10}, terms) <= 5.0
    with pytest.raises(ValueError, match="no noise multiplier"):
        noise_multiplier(1.0, 1, terms, before=before)


def test_no_sigma_is_enough() -> None:
    with pytest.raises(ValueError, match="no noise multiplier"):
        noise_multiplier(1e-9, 10**9, Terms(1e-12))


@pytest.mark.parametrize(("accountant", "most"), [(PLD, 2666), (RDP, 2195)])
def test_most_steps_within_a_target(accountant: AccountantType, most: int) -> None:
    terms = Terms(1e-5, accountant)
    mechanism = Mechanism(1.0, 0.01)
    assert most_uses({}, mechanism, 3.0, terms) == most
    assert epsilon({mechanism: most}, terms) <= 3.0 < epsilon({mechanism: most + 1}, terms)


def test_what_others_have_used_leaves_less() -> None:
    terms = Terms(1e-5)
    mechanism, other = Mechanism(2.0), Mechanism(4.0)
    alone = most_uses({}, mechanism, 5.0, terms)
    beside = most_uses({other: 4 * (alone // 2), mechanism: 99}, mechanism, 5.0, terms)
    assert beside == alone - alone // 2  # four of the other weigh as much as one


def test_none_fits() -> None:
    assert most_uses({}, Mechanism(0.0, 0.01), 3.0, Terms(1e-5)) == 0
    assert most_uses({Mechanism(0.5): 10}, Mechanism(100.0), 3.0, Terms(1e-5)) == 0


def test_never_too_often() -> None:
    assert most_uses({}, Mechanism(1.0, 0.0), 3.0, Terms(1e-5)) == MOST_STEPS


def test_changed_parameters_fall_back_to_a_valid_filter() -> None:
    """A PLD of mechanisms that may have been chosen by looking is no filter: RDP adds them up."""
    mixed = {Mechanism(1.0, 0.01): 500, Mechanism(1.2, 0.01): 500}
    assert not is_exact(mixed, Terms(1e-5))
    assert epsilon(mixed, Terms(1e-5)) == epsilon(mixed, Terms(1e-5, RDP))
    assert is_exact({Mechanism(1.0): 5, Mechanism(1.2): 5}, Terms(1e-5))


def test_gaussians_add_up_exactly() -> None:
    """Σ n/σ²: 4 releases at σ = 2 are one at σ = 1; and the library's own PLD agrees."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    together = epsilon({Mechanism(2.0): 4, Mechanism(1.0): 1}, Terms(1e-5))
    assert together == pytest.approx(epsilon({Mechanism(1.0): 2}, Terms(1e-5)), rel=1e-12)
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(1.0), 2)
    assert together == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-4)


def test_a_noised_loss_costs_what_is_published() -> None:
    """q = 0.01, σ = 1, 1,000 steps: 1.828 without a loss, 1.847 at σ_l = 10, 1.906 at 5."""
    terms = Terms(1e-5)
    for loss, expected in [(None, 1.828), (10.0, 1.847), (5.0, 1.906)]:
        mechanism = Mechanism(joint_noise_multiplier(1.0, loss), 0.01)
        assert epsilon({mechanism: 1000}, terms) == pytest.approx(expected, abs=2e-3)
    assert joint_noise_multiplier(0.0, 5.0) == 0.0


@settings(max_examples=8, deadline=None)
@given(
    sigma=st.floats(0.6, 4.0),
    q=st.floats(0.001, 0.2),
    steps=st.integers(1, 2000),
    delta=st.floats(1e-8, 1e-4),
)
def test_more_steps_more_data_or_less_noise_never_cost_less(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    pld, rdp = Terms(delta), Terms(delta, RDP)
    spent = epsilon({Mechanism(sigma, q): steps}, pld)
    assert spent <= epsilon({Mechanism(sigma, q): 2 * steps}, pld)
    assert spent <= epsilon({Mechanism(sigma, q): steps}, rdp) + 1e-6
    assert spent >= epsilon({Mechanism(1.5 * sigma, q): steps}, pld)
    assert spent <= epsilon({Mechanism(sigma, 1.5 * q): steps}, pld)
    assert spent <= epsilon({Mechanism(sigma): steps}, pld) + 1e-6


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [
        (0.001, 0.01, 1),  # a grid of 38 GiB
        (1e-6, 0.5, 1),
        (0.3, 0.02, 1_000_000),
        (1.0, 0.5, MOST_STEPS),
    ],
)
def test_what_no_grid_can_hold_has_an_upper_bound(
    adjacency: Adjacency, sigma: float, q: float, steps: int
) -> None:
    """Anybody may ask for it, and the coordinator's memory is everybody's."""
    terms, used = Terms(1e-5, PLD, adjacency), {Mechanism(sigma, q): steps}
    unsampled = epsilon({Mechanism(sigma): steps}, terms)
    if adjacency is Adjacency.REPLACE_ONE:
        assert epsilon(used, terms) == unsampled
    else:
        assert not is_exact(used, terms)
        assert epsilon(used, terms) == epsilon(used, Terms(1e-5, RDP, adjacency))
        # Nothing that was not drawn costs more; RDP's own bound is a little above a Gaussian's.
        assert 100 < epsilon(used, terms) < 1.1 * unsampled + 1


def test_a_target_that_forbids_nothing_is_found_a_sigma_for() -> None:
    terms = Terms(1e-5)
    found = noise_multiplier(1e6, 1000, terms, 0.5)
    assert epsilon({Mechanism(found, 0.5): 1000}, terms) <= 1e6
    assert most_uses({}, Mechanism(found, 0.5), 1e6, terms) >= 1000
