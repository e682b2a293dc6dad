"""Chained sums and differences: a task that is made from numbers alone."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_client.errors import ConfigError

_INTEGER = re.compile(r"[-+]?\d+")


@dataclass(frozen=True)
class ChainSum:
    """Entries such as `Q: 6 - 8 =\\nA:` with the answer `-2`, each a function of (seed, index).

    The interface is that of `reasoning-gym`'s `chain_sum`; the questions are shorter.

    Args:
        min_terms, max_terms: how many numbers are added or subtracted.
        min_digits, max_digits: of each number; no leading zeros, and 0 only with one digit.
        seed: which sums.
        size: how many.
        integer_reward: what `score_answer` gives for any integer; the right one gives 1.
    """

    min_terms: int = 2
    max_terms: int = 2
    min_digits: int = 1
    max_digits: int = 1
    seed: int = 0
    size: int = 1000
    integer_reward: float = 0.2

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.max_terms:
            raise ConfigError.of("min_terms", "must be 2 or more, and at most max_terms")
        if not 1 <= self.min_digits <= self.max_digits:
            raise ConfigError.of("min_digits", "must be 1 or more, and at most max_digits")
        if self.size < 1:
            raise ConfigError.of("size", f"must be 1 or more, got {self.size}")
        if not 0 <= self.integer_reward < 1:
            raise ConfigError.of("integer_reward", "must be from 0 to below 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} sums")
        draw = random.Random(f"{self.seed}:{index}")  # noqa: S311 - a task, not a secret
        numbers = [self._number(draw) for _ in range(draw.randint(self.min_terms, self.max_terms))]
        expression, total = str(numbers[0]), numbers[0]
        for number in numbers[1:]:
            plus = draw.random() < 0.5
            expression += f" {'+' if plus else '-'} {number}"
            total += number if plus else -number
        return {
            "question": f"Q: {expression} =\nA:",
            "answer": str(total),
            "metadata": {"expression": expression, "source_index": index},
        }

    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """1 for the right integer, `integer_reward` for another one, 0 for anything else."""
        found = _INTEGER.fullmatch((answer or "").strip())
        if found is None:
            return 0.0
        try:
            right = int(found[0]) == int(entry["answer"])
        except ValueError:  # more digits than Python reads
            right = False
        return 1.0 if right else self.integer_reward

    def _number(self, draw: random.Random) -> int:
        digits = draw.randint(self.min_digits, self.max_digits)
        return draw.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def same_terms(entry: Mapping[str, Any]) -> str:
    """What a sum has in common with those of its terms in another order, for `Split`."""
    signed = entry["metadata"]["expression"].replace("- ", "-").replace("+ ", "").split()
    return " ".join(sorted(signed))
