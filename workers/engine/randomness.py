"""Counter-based randomness: every draw is a function of what it is for, never of a stream.

Replay, another split into passes, or other company therefore change no draw.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BITS = 64

# MurmurHash3's 32-bit finaliser (Austin Appleby, public domain), as signed constants.
_MIX_1 = 0x85EBCA6B - 2**32
_MIX_2 = 0xC2B2AE35 - 2**32


def derive(seed: int, *parts: int | str) -> int:
    """A 64-bit key for one purpose: BLAKE2b of the seed and the parts, each with its type."""
    digest = hashlib.blake2b(digest_size=_BITS // 8)
    for part in (seed, *parts):
        kind, text = ("i", str(part)) if isinstance(part, int) else ("s", part)
        data = text.encode()
        digest.update(f"{kind}{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def uniform(seed: int, *parts: int | str) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (derive(seed, *parts) >> (_BITS - 53)) / 2**53


def cpu_generator(seed: int, *parts: int | str) -> torch.Generator:
    """A generator for one purpose; on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *parts) >> 1)


def int32_key(seed: int, *parts: int | str) -> int:
    """A key in int32's range."""
    key = derive(seed, *parts) & 0xFFFFFFFF
    return key - 2**32 if key >= 2**31 else key


def mix32(keys: Tensor) -> Tensor:
    """MurmurHash3's finaliser on int32 `keys` of any shape: a bijection that spreads every bit."""
    mixed = keys ^ _shift(keys, 16)
    mixed = mixed * _MIX_1
    mixed = mixed ^ _shift(mixed, 13)
    mixed = mixed * _MIX_2
    return mixed ^ _shift(mixed, 16)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own copies the sign bit."""
    low = 2 ** (32 - bits) - 1
    return torch.bitwise_and(torch.bitwise_right_shift(values, bits), low)
