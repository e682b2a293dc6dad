"""What reward functions give, checked and as plain numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST = 1e30
"""Of a reward: advantages are float32, and divided by a standard deviation."""


def total(outcome: Any) -> float:
    """The reward itself, of a reward function's outcome.

    Raises:
        TypeError, ValueError: if it is none: not a number, or not finite.
    """
    value = outcome.get("reward") if isinstance(outcome, Mapping) else outcome
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"a reward must be a number, or a dict with 'reward'; got {outcome!r}")
    if not math.isfinite(value):
        raise ValueError(f"a reward must be finite, got {value}")
    number = float(value)
    if abs(number) > LARGEST:
        raise ValueError(f"a reward must be from {-LARGEST:g} to {LARGEST:g}, got {number:g}")
    return number


def plain(outcome: Any) -> float | dict[str, float]:
    """The whole outcome: `float` of any kind of number, NumPy's among them, and of parts' bools.

    Raises:
        TypeError, ValueError: naming the key whose value is no number, or not finite.
    """
    reward = total(outcome)
    if not isinstance(outcome, Mapping):
        return reward
    return {"reward": reward} | {
        _name(name): _part(name, value) for name, value in outcome.items() if name != "reward"
    }


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the parts of a reward have names for keys, got {name!r}")
    return "".join(name)  # a subclass may be pickled as anything


def _part(name: Any, value: Any) -> float:
    # NumPy's bool is no number to Python, which its own bool is.
    number = bool(value) if isinstance(value, np.bool_) else value
    if not isinstance(number, numbers.Real):
        raise TypeError(f"the reward's part {name!r} must be a number, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"the reward's part {name!r} must be finite, got {value!r}")
    return float(number)
