"""Poisson sampling: every unit with one probability, independently, anew for each step.

Amplification by sampling (Abadi et al. 2016, arXiv 1607.00133) needs draws that nobody can predict
or learn, so they come from the operating system and are never told.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from tensafe.wire.tensors import Array

_AT_ONCE = 2**20


def draw(units: int, rate: float, test_seed: tuple[int, str] | None = None) -> Array:
    """Which of so many units are in a batch: int64, ascending.

    Each 64-bit number below rate·2⁶⁴ is one, so that the probability is the rate to 2⁻⁶⁴.

    Args:
        rate: with which probability each is, in (0, 1].
        test_seed: for tests: a seed and what the draw is for, of which it is a function.
    """
    if rate >= 1:
        return np.arange(units, dtype=np.int64)
    below = np.uint64(int(rate * 2**64))
    found = []
    stream = _TestStream(*test_seed) if test_seed is not None else None
    for begin in range(0, units, _AT_ONCE):
        count = min(_AT_ONCE, units - begin)
        data = stream.take(8 * count) if stream is not None else os.urandom(8 * count)
        found.append(np.flatnonzero(np.frombuffer(data, "<u8") < below) + begin)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


class _TestStream:
    """Bytes that are a function of a seed."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = f"{seed}/{purpose}".encode()
        self._block = 0

    def take(self, count: int) -> bytes:
        self._block += 1
        return hashlib.shake_256(self._key + self._block.to_bytes(8, "little")).digest(count)
