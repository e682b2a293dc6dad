"""What ε is a function of: noised releases, and how many of each were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Adjacency(StrEnum):
    """What two neighbouring datasets differ in."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    ZERO_OUT = "zero_out"


class AccountantType(StrEnum):
    """How privacy loss is added up."""

    PLD = "pld"
    RDP = "rdp"


@dataclass(frozen=True, slots=True, order=True)
class Mechanism:
    """A release of Σ over a batch's units of vectors of norm ≤ C, with noise N(0, (σC)²).

    Attributes:
        noise_multiplier: σ ≥ 0.
        sample_rate: with which probability, by Poisson sampling, a unit is in the batch; 1 where
            nothing is known about how batches are chosen.
    """

    noise_multiplier: float
    sample_rate: float = 1.0


Composition = Mapping[Mechanism, int]
"""How often each mechanism was used."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How ε is stated.

    Attributes:
        delta: δ in (0, 1).
    """

    delta: float
    accountant: AccountantType = AccountantType.PLD
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE


def joint_noise_multiplier(gradient: float, loss: float | None) -> float:
    """σ of a release of two sums, each with noise of its own over its own bound.

    A unit moves the pair (g/(σ_g C), l/(σ_l L)) by at most √(σ_g⁻² + σ_l⁻²), so that the two
    together are one Gaussian mechanism with the inverse of that.

    Args:
        gradient: σ_g of the gradient's sum.
        loss: σ_l of the sum of losses; None: it is not released.
    """
    if loss is None or gradient == 0:
        return gradient
    return 1 / math.sqrt(gradient**-2 + loss**-2)
