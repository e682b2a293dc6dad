"""From rewards to advantages: pure functions of numbers.

Shapes: rewards come as groups, one [G_p] for each of P problems; groups may differ in size, since
failed rewards are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Groups = Sequence[Floats]

_EPSILON = 1e-6
_ROUNDING = 1e-12


@dataclass
class MovingAverage:
    """Mean reward of the batches so far, the newer the heavier (bias-corrected).

    Attributes:
        decay: weight of what was, 0 to 1.
        total, weight: Σ and its Σ of weights; 0 before the first batch.
    """

    decay: float = 0.9
    total: float = 0.0
    weight: float = 0.0

    def take_in(self, mean: float) -> float:
        """Returns the average before this batch (its own mean for the first), then adds it."""
        before = self.total / self.weight if self.weight else mean
        self.total = self.decay * self.total + (1 - self.decay) * mean
        self.weight = self.decay * self.weight + (1 - self.decay)
        return before


def advantages(groups: Groups, baseline: str, scale: str, average: MovingAverage) -> list[Floats]:
    """A = (r − baseline) / scale for every reward.

    Args:
        baseline: "group_mean", "group_others" (the mean of the group's other rewards: unbiased, and
            the group mean's advantage times G / (G − 1)), "batch_mean", "moving_average" or "none".
        scale: "group" or "batch": the standard deviation of the rewards there, over N; "none".
        average: of the baseline of that name; changed by it alone.
    """
    every = np.concatenate(list(groups)) if groups else np.zeros(0)
    if not every.size:
        return [np.zeros(len(group)) for group in groups]
    if baseline == "moving_average":
        common = average.take_in(float(every.mean()))
    else:
        common = float(every.mean()) if baseline == "batch_mean" else 0.0
    centred = [_centred(group, baseline, common) for group in groups]
    if scale == "none":
        return centred
    spread = float(every.std())
    return [
        part / ((float(group.std()) if scale == "group" else spread) + _EPSILON)
        for part, group in zip(centred, groups, strict=True)
    ]


def _centred(group: Floats, baseline: str, common: float) -> Floats:
    if not group.size:
        return group
    if baseline == "group_mean":
        return _away(group, float(group.mean()))
    if baseline == "group_others":
        # A lone reward has nothing to be compared with.
        factor = group.size / (group.size - 1) if group.size > 1 else 0.0
        return _away(group, float(group.mean())) * factor
    return _away(group, common)


def _away(group: Floats, base: float) -> Floats:
    """From a mean of equal rewards they are 0 away, not what its rounding leaves."""
    away = group - base
    return np.where(np.abs(away) <= _ROUNDING * np.maximum(np.abs(group), abs(base)), 0.0, away)


def is_equal(group: Floats) -> bool:
    """Whether a group's rewards are all the same, so that it compares nothing within itself."""
    return bool(group.size == 0 or np.ptp(group) == 0)


def token_weights(lengths: Sequence[int], aggregate: str, constant: int) -> list[float]:
    """What each scored token of each rollout weighs, for a loss under the reduction `sum`.

    Args:
        lengths: scored tokens of each rollout, 1 or more.
        aggregate: "token": 1 / Σ lengths. "sequence": 1 / (N · length). "constant":
            1 / (N · constant).
    """
    count, total = len(lengths), sum(lengths)
    if aggregate == "token":
        return [1 / total] * count
    if aggregate == "sequence":
        return [1 / (count * length) for length in lengths]
    return [1 / (count * constant)] * count
