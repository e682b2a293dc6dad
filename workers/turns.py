"""Whose turn it is when a worker has both to train and to sample."""

from __future__ import annotations


class Turns:
    """Shares time evenly: whoever has had less of it since both had work is next.

    One turn is a group of operations or a step of the sampler, so neither waits longer than the
    other's longest turn, and the same time again that it was itself ahead.
    """

    def __init__(self) -> None:
        self._ahead_s = 0.0
        self._contested = False

    def training_is_next(self, *, trains: bool, samples: bool) -> bool:
        """Asked before each turn, with what there is to do."""
        self._contested = trains and samples
        if not self._contested:
            self._ahead_s = 0.0  # nobody saves time up while the other is idle
            return trains
        return self._ahead_s <= 0

    def trained(self, seconds: float) -> None:
        """Training has had the turn."""
        self._ahead_s += seconds if self._contested else 0.0

    def sampled(self, seconds: float) -> None:
        """Sampling has had it."""
        self._ahead_s -= seconds if self._contested else 0.0
