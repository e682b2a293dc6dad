"""Whether an update could leave the range of its numbers' type, told before anything is touched.

An optimizer's rule says how large its numbers can become. So none has to be copied in case it must
be taken back, nor looked at afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.operations import OptimizerSettings

_MARGIN = 2**10
"""For rounding, and for differences of two numbers, which are up to twice as large."""
_LEAST_NORM = 1e-15
"""Below it float32's squares may be 0."""


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
    beta1, beta2, eps = own.adam()
    decoupled = own.name == "adamw"
    slope = gradient if decoupled else gradient + decay * before.weights
    # Means, of which each number is below the largest that went into them.
    first, second = max(before.first, slope), max(before.second, slope * slope)
    # Of the first step, which corrects most for moments that begin at zero.
    pace = rate / (1 - beta1)
    spread = math.sqrt(second) / math.sqrt(1 - beta2)
    moved = pace * (first / eps)
    # |1 − rate·decay|
    kept = before.weights * max(1.0, rate * decay) if decoupled else before.weights
    on_the_way = [slope, pace, pace * first, first / eps, spread, rate * decay]
    return Bounds(kept + moved, first, second), on_the_way


def _sgd(
    before: Bounds, own: OptimizerSettings, gradient: float, rate: float, decay: float
) -> tuple[Bounds, list[float]]:
    slope = gradient + decay * before.weights
    first = (own.momentum or 0.0) * before.first + slope
    return Bounds(before.weights + rate * first, first), [slope, rate, decay]


def norms(vectors: Sequence[Tensor]) -> list[float]:
    """L2, in one transfer from the device unless one is infinite for its squares alone, or 0."""
    found: list[float] = torch.stack(torch._foreach_norm(list(vectors))).tolist()
    return [
        norm
        if math.isfinite(norm) and norm > _LEAST_NORM
        else float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        for norm, vector in zip(found, vectors, strict=True)
    ]
