"""How many tokens go through a model at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from copy import copy

log = logging.getLogger(__name__)

_PATIENCE = 32
_LONGEST_PATIENCE = 4096
_GROWTH = 1.5


class TokenBudget:
    """Most tokens of one pass: halved when the device runs out of memory, and grown again with
    care, since what took the memory may be gone.

    It grows by half after 32 passes that filled most of it and fitted, up to what it began with. To
    come to a size that has failed it waits for twice as many each time that it fails again, up to
    4,096: so few passes are lost to trying. In the same way it is tried whether what could not be
    cut fits again without making its activations anew.

    Args:
        tokens: to begin with, and at most.

    Attributes:
        fixed: what deterministic runs use. It is the same on every machine, so that how their
            batches are cut depends on the batches alone.
        frugal: passes of at least so many tokens make their activations anew.
    """

    fixed = 2048

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._most = tokens
        self._failed: float = math.inf  # the size that failed last
        self._patience = _PATIENCE  # before that size is tried again
        self._fitted = 0
        self.frugal: float = math.inf
        self._frugal_patience = _PATIENCE
        self._frugal_passes = 0

    @property
    def together(self) -> int:
        """Most tokens of several rows: less than what makes its activations anew."""
        return max(1, int(min(self.tokens, self.frugal - 1)))

    def trial(self) -> TokenBudget:
        """A copy, to be halved while it is not known whether any size would do."""
        return copy(self)

    def adopt(self, trial: TokenBudget) -> None:
        """Takes over what was learnt with a copy."""
        vars(self).update(vars(trial))

    def halve(self, used: int) -> None:
        """After a pass of at most `used` tokens did not fit."""
        failed = min(self.tokens, used)
        if failed >= self._failed:
            self._patience = min(_LONGEST_PATIENCE, 2 * self._patience)
        self._failed = failed
        self.tokens = max(1, failed // 2)
        self._fitted = 0
        log.warning("out of memory; trying passes of up to %d tokens", self.tokens)

    def spare(self, used: int) -> None:
        """After a pass of `used` tokens that cannot be cut did not fit."""
        if math.isinf(self.frugal) and self._frugal_passes:  # it was tried again
            self._frugal_patience = min(_LONGEST_PATIENCE, 2 * self._frugal_patience)
        self.frugal, self._frugal_passes = used, 0
        log.warning("out of memory; passes from %d tokens on make their activations anew", used)

    def spared(self, passes: int) -> None:
        """After so many passes that made their activations anew."""
        self._frugal_passes += passes
        if self._frugal_passes >= self._frugal_patience:
            self.frugal = math.inf

    def fitted(self, passes: Iterable[int]) -> None:
        """After training passes of so many tokens each have fitted."""
        if self.tokens >= self._most:
            return
        # A small one shows nothing of the room that a full one needs.
        self._fitted += sum(2 * used > self.tokens for used in passes)
        larger = min(self._most, math.ceil(self.tokens * _GROWTH))
        if self._fitted < (self._patience if larger >= self._failed else _PATIENCE):
            return
        if self.tokens >= self._failed:  # it fits now
            self._failed, self._patience = math.inf, _PATIENCE
        self.tokens = larger
        self._fitted = 0
        log.info("passes fit again; they now take up to %d tokens", self.tokens)
