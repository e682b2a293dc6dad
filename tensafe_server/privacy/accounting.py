"""ε of compositions, by Google's `dp-accounting`. Pure functions; some take seconds.

One mechanism, used any number of times, is added up by privacy loss distributions. Where parameters
change, they may have been chosen by looking at what was released before, and a stopping rule on a
PLD is then no valid privacy filter (arXiv 2602.06756); one on Rényi divergences is (Lécuyer 2021,
arXiv 2103.01379), and so is one on the sum of Gaussians (Koskela et al. 2022, arXiv 2210.17520).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tensafe_server.privacy.mechanisms import (
    AccountantType,
    Adjacency,
    Composition,
    Mechanism,
    Terms,
)

_SIGMA_TOLERANCE = 1e-5
LEAST_SIGMA = 1e-6
"""Less noise than that is none, and is refused."""
MOST_SIGMA = 1e6
MOST_STEPS = 2**24
"""More steps than anybody makes: what is within budget up to here is never refused."""
_FARTHEST_OF_ONE, _FARTHEST = 130.0, 5000.0
"""How far the grid of a PLD may reach, of one release and of all together."""
_SPACING = 1e-4
"""Between the points of a grid, in ε: what the library has of itself."""
_MOST_POINTS_OF_ONE, _MOST_POINTS = 300_000, 2_000_000
"""A grid that would have more is 2, 4, … times as coarse, so that none takes more than some seconds
and 100 MB. ε is rounded up then, by less than 1e-4 of it: it is of tens at least."""
_AT_THE_END = 1e-12
"""The δ at which ε tells about how far a grid reaches."""
_LEAST_DELTA = 1e-14
"""The library cuts tails of about 1e-15 off a PLD, and counts them as infinite loss."""
_ROUNDING = 2.0**-52
"""What a Fourier transform's rounding may hide of δ, for each release that it adds up: at most
0.8 · 2⁻⁵³ was measured, against exact Gaussians and against convolutions without a transform."""


class UnsupportedCompositionError(ValueError):
    """No accountant here can add these up."""


def epsilon(composition: Composition, terms: Terms) -> float:
    """ε of everything in a composition together; infinite without noise.

    Where so much is released that a PLD would not fit into memory, or δ is below what one can tell,
    it is an upper bound: by RDP, or of the same without sampling where there is no RDP.

    Raises:
        UnsupportedCompositionError: different mechanisms with sampling, under REPLACE_ONE.
    """
    used = {mechanism: n for mechanism, n in composition.items() if n and mechanism.sample_rate}
    if any(mechanism.noise_multiplier == 0 for mechanism in used):
        return math.inf
    if not used:
        return 0.0
    if terms.accountant is AccountantType.PLD:
        if all(mechanism.sample_rate == 1 for mechanism in used):
            return _gaussian_epsilon(used, terms)
        if len(used) == 1:
            [(mechanism, n)] = used.items()
            reach = _reach(mechanism, n, terms)
            if reach is not None:
                return _pld_epsilon(mechanism, n, terms, reach)
            if not _has_rdp(terms.adjacency, mechanism.sample_rate):
                return _gaussian_epsilon({Mechanism(mechanism.noise_multiplier): n}, terms)
    return _rdp_epsilon(used, terms)


def is_exact(composition: Composition, terms: Terms) -> bool:
    """Whether `epsilon` is by the accountant that the terms name: by RDP else."""
    used = {mechanism: n for mechanism, n in composition.items() if n and mechanism.sample_rate}
    if terms.accountant is AccountantType.RDP or all(one.sample_rate == 1 for one in used):
        return True
    return len(used) == 1 and all(_reach(*one, terms) is not None for one in used.items())


def is_slow(composition: Composition, terms: Terms) -> bool:
    """Whether `epsilon` takes a tenth of a second or more: sampled releases by PLD."""
    used = [mechanism for mechanism, n in composition.items() if n and mechanism.sample_rate]
    return terms.accountant is AccountantType.PLD and len(used) == 1 and used[0].sample_rate < 1


def check_supported(accountant: AccountantType, adjacency: Adjacency, sample_rate: float) -> None:
    """Raises UnsupportedCompositionError for what no composition could be computed of."""
    if (
        accountant is AccountantType.RDP
        and adjacency is Adjacency.REPLACE_ONE
        and 0 < sample_rate < 1
    ):
        raise _no_replace_one()


def noise_multiplier(
    target_epsilon: float,
    steps: int,
    terms: Terms,
    sample_rate: float = 1.0,
    before: Composition | None = None,
) -> float:
    """The least σ with which so many steps stay within ε, rounded up by at most 2e-5.

    Args:
        before: what was released already, and counts too.

    Raises:
        ValueError: no σ up to 1e6 is enough.
        UnsupportedCompositionError: it cannot be added up.
    """
    others = dict(before or {})

    def spent(sigma: float, accountant: AccountantType) -> float:
        mechanism = Mechanism(sigma, sample_rate)
        used = {**others, mechanism: others.get(mechanism, 0) + steps}
        return epsilon(used, Terms(terms.delta, accountant, terms.adjacency))

    cheap = _cheap(terms.accountant, terms.adjacency, sample_rate)
    high = 1.0
    while spent(high, cheap) > target_epsilon:
        high *= 2
        if high > MOST_SIGMA:
            raise ValueError(f"no noise multiplier up to {MOST_SIGMA:g} is enough")
    low = high / 2
    while spent(low, cheap) <= target_epsilon and low > _SIGMA_TOLERANCE:
        low, high = low / 2, low
    # What the cheap accountant finds is enough by the tight one too; it needs little less.
    high = _root(lambda sigma: spent(sigma, cheap) - target_epsilon, low, high)
    while spent(high, terms.accountant) > target_epsilon:  # by the grid of a PLD
        high *= 1.01
    low = 0.9 * high
    while spent(low, terms.accountant) <= target_epsilon:
        low, high = 0.8 * low, low
        if high < _SIGMA_TOLERANCE:
            return high
    found = _root(lambda sigma: spent(sigma, terms.accountant) - target_epsilon, low, high)
    while spent(found, terms.accountant) > target_epsilon:
        found += _SIGMA_TOLERANCE
    return found


def most_uses(
    composition: Composition, mechanism: Mechanism, target_epsilon: float, terms: Terms
) -> int:
    """How often in all a mechanism may be used beside the others of a composition, whose own count
    of it does not matter; MOST_STEPS if it is never too often."""
    others = {other: n for other, n in composition.items() if other != mechanism}
    cheap = _cheap(terms.accountant, terms.adjacency, mechanism.sample_rate)
    if cheap is terms.accountant:
        begin = 1
    else:
        bound = Terms(terms.delta, cheap, terms.adjacency)
        begin = max(1, most_uses(composition, mechanism, target_epsilon, bound))

    def spent(uses: int) -> float:
        return epsilon({**others, mechanism: uses}, terms)

    low, at_low = 0, 0.0
    high, at_high = begin, spent(begin)
    while at_high <= target_epsilon:
        if high >= MOST_STEPS:
            return MOST_STEPS
        low, at_low = high, at_high
        # ε grows about as the root of the number, so this lies a little beyond.
        factor = 1.05 * (target_epsilon / at_low) ** 2 if at_low else 2.0
        high = min(MOST_STEPS, max(low + 1, int(low * min(factor, 2.0))))
        at_high = spent(high)
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (target_epsilon - at_low) / (at_high - at_low)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        at_middle = spent(middle)
        # A secant hits one side time after time; then the middle comes in between.
        halve = not halve and high - low > 4
        if at_middle <= target_epsilon:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low


def _cheap(accountant: AccountantType, adjacency: Adjacency, sample_rate: float) -> AccountantType:
    """One that never tells less, and takes no time."""
    if sample_rate < 1 and _has_rdp(adjacency, sample_rate):
        return AccountantType.RDP
    return accountant


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is 0, between where it is above and where it is not, rounded up."""
    from scipy.optimize import brentq

    tolerance = _SIGMA_TOLERANCE / 2
    return min(high, float(brentq(excess, low, high, xtol=tolerance)) + tolerance)


def _gaussian_epsilon(used: Composition, terms: Terms) -> float:
    """Gaussians add up to one Gaussian (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    import dp_accounting

    sensitivity = 2.0 if terms.adjacency is Adjacency.REPLACE_ONE else 1.0
    mu = sensitivity * math.sqrt(sum(n / m.noise_multiplier**2 for m, n in used.items()))
    return float(dp_accounting.get_epsilon_gaussian(1 / mu, terms.delta))


def _pld_epsilon(mechanism: Mechanism, n: int, terms: Terms, reach: _Reach) -> float:
    distribution = _pld(mechanism, terms.adjacency, reach.spacing)
    composed = distribution if n == 1 else distribution.self_compose(n)
    return float(composed.get_epsilon_for_delta(terms.delta - n * _ROUNDING))


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far the grid of a PLD goes, in ε: of one release, and of all together."""

    one: float
    whole: float

    @property
    def spacing(self) -> float:
        """Between its points."""
        least = max(self.one / _MOST_POINTS_OF_ONE, self.whole / _MOST_POINTS)
        return _SPACING * 2.0 ** math.ceil(math.log2(max(1.0, least / _SPACING)))


def _reach(mechanism: Mechanism, n: int, terms: Terms) -> _Reach | None:
    """Of so many sampled releases; None where their PLD would not fit into memory, or cannot tell
    ε at that δ."""
    import dp_accounting

    sigma = mechanism.noise_multiplier
    if terms.delta < max(_LEAST_DELTA, 2 * n * _ROUNDING):
        return None
    if terms.adjacency is Adjacency.REPLACE_ONE:
        sigma /= 2
    one = float(dp_accounting.get_epsilon_gaussian(sigma, _AT_THE_END))
    if one > _FARTHEST_OF_ONE:
        return None
    whole = _rdp_epsilon({replace(mechanism, noise_multiplier=sigma): n}, Terms(_AT_THE_END))
    return _Reach(one, max(one, whole)) if whole <= _FARTHEST else None


@lru_cache(maxsize=32)
def _pld(mechanism: Mechanism, adjacency: Adjacency, spacing: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        mechanism.noise_multiplier,
        sampling_prob=mechanism.sample_rate,
        neighboring_relation=_relation(adjacency),
        value_discretization_interval=spacing,
    )


def _rdp_epsilon(used: Composition, terms: Terms) -> float:
    from dp_accounting.rdp import compute_epsilon

    total: Any = 0.0
    orders: Any = None
    for mechanism, n in used.items():
        orders, rdp = _rdp(mechanism, terms.adjacency)
        total = total + n * rdp
    found: tuple[float, float] = compute_epsilon(orders, total, terms.delta)
    return float(found[0])


@lru_cache(maxsize=1024)
def _rdp(mechanism: Mechanism, adjacency: Adjacency) -> tuple[Any, Any]:
    """(orders, Rényi divergence of one release at each)."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    _quiet()
    if not _has_rdp(adjacency, mechanism.sample_rate):
        raise _no_replace_one()
    if adjacency is Adjacency.REPLACE_ONE:
        # The library's accountant takes a Gaussian's sensitivity to be 1 under every relation.
        adjacency = Adjacency.ADD_OR_REMOVE_ONE
        mechanism = Mechanism(mechanism.noise_multiplier / 2)
    event: Any = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    if mechanism.sample_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(mechanism.sample_rate, event)
    accountant = RdpAccountant(neighboring_relation=_relation(adjacency))
    accountant.compose(event)
    return accountant.orders, accountant.rdp


def _has_rdp(adjacency: Adjacency, sample_rate: float) -> bool:
    return adjacency is not Adjacency.REPLACE_ONE or sample_rate == 1


def _no_replace_one() -> UnsupportedCompositionError:
    return UnsupportedCompositionError(
        "no RDP accountant adds up sampled batches under the adjacency replace_one"
    )


def _relation(adjacency: Adjacency) -> Any:
    import dp_accounting

    relation = dp_accounting.NeighboringRelation
    return {
        Adjacency.ADD_OR_REMOVE_ONE: relation.ADD_OR_REMOVE_ONE,
        Adjacency.REPLACE_ONE: relation.REPLACE_ONE,
        Adjacency.ZERO_OUT: relation.REPLACE_SPECIAL,
    }[adjacency]


@lru_cache(maxsize=1)
def _quiet() -> None:
    """Orders that do not converge are left out, which is sound, and no news to an operator."""
    import logging

    logger = logging.getLogger("absl")
    logger.addFilter(lambda record: "converge" not in record.getMessage())


def version() -> str:
    """Name and version of the library, for reports."""
    from importlib.metadata import version as installed

    return f"dp-accounting {installed('dp-accounting')}"
