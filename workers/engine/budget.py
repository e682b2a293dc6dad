"""How many tokens go through a model at once."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class TokenBudget:
    """Most tokens of one pass; halved when the device runs out of memory.

    Args:
        tokens: to begin with.

    Attributes:
        fixed: what deterministic runs use. It is the same on every machine, so that how their
            batches are cut depends on the batches alone.
    """

    fixed = 2048

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self, used: int) -> None:
        """After a pass of at most `used` tokens did not fit."""
        self.tokens = max(1, min(self.tokens, used) // 2)
        log.warning("out of memory; passes now take %d tokens", self.tokens)
