"""Whether an update could leave the range of its numbers' type, told before anything is touched.

An optimizer's rule says how large its numbers can become. So none has to be copied in case it must
be taken back, nor looked at afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.operations import OptimizerSettings

_MARGIN = 2**10
"""For rounding, and for differences of two numbers, which are up to twice as large: far more than
it takes, where numbers of a training are far from either."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """None of a run's numbers is larger in size.

    Attributes:
        weights: the adapter's.
        first: the mean of gradients, or their sum with momentum.
        second: the mean of their squares.
    """

    weights: float
    first: float = 0.0
    second: float = 0.0


def after(
    before: Bounds,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    *,
    gradient: float,
    rate: float,
    decay: float,
) -> Bounds | None:
    """What holds after an update; None if a number of it, or one on the way to it, may be NaN or
    infinite.

    Args:
        dtype: of all numbers.
        gradient: its L2 norm, which no number of it exceeds.
        rate: of learning.
        decay: of weights.
    """
    if settings.name != "sgd" and settings.adam()[2] < torch.finfo(dtype).tiny:
        return None  # it is 0 in this type
    rule = _sgd if settings.name == "sgd" else _adam
    reached, on_the_way = rule(before, settings, gradient, rate, decay)
    most = torch.finfo(dtype).max / _MARGIN
    sizes = reached.weights, reached.first, reached.second, *on_the_way
    # NaN is not below anything.
    return reached if all(size < most for size in sizes) else None


def _adam(
    before: Bounds, own: OptimizerSettings, gradient: float, rate: float, decay: float
) -> tuple[Bounds, list[float]]:
    beta1, _, eps = own.adam()
    decoupled = own.name == "adamw"
    slope = gradient if decoupled else gradient + decay * before.weights
    # Means, of which each number is below the largest that went into them.
    first, second = max(before.first, slope), max(before.second, slope * slope)
    # Of the first step, which corrects most for moments that begin at zero. ε alone bounds what it
    # is added to: where a second moment is 0, nothing else does.
    pace = rate / (1 - beta1)
    moved = pace * (first / eps)
    # |1 − rate·decay|
    kept = before.weights * max(1.0, rate * decay) if decoupled else before.weights
    on_the_way = [pace, first / eps, decay, rate * decay]
    return Bounds(kept + moved, first, second), on_the_way


def _sgd(
    before: Bounds, own: OptimizerSettings, gradient: float, rate: float, decay: float
) -> tuple[Bounds, list[float]]:
    slope = gradient + decay * before.weights
    first = (own.momentum or 0.0) * before.first + slope
    return Bounds(before.weights + rate * first, first), [rate, decay]
