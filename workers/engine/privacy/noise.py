"""Gaussian noise from a cryptographic generator; see docs/adr/0016.

A key serves for one vector and is gone. Uniform numbers are 53 bits of ChaCha20's key stream
(RFC 8439); pairs of them become pairs of normal numbers by Box and Muller's transform, in float64.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from workers.engine.randomness import derive

_KEY_BYTES = 32
_CHUNK = 2**15
"""Numbers made at a time: their float64 intermediates stay in a CPU's cache."""
_BITS = 53


def fresh_key() -> bytes:
    """From the operating system's generator."""
    return os.urandom(_KEY_BYTES)


def seeded_key(seed: int, step: int) -> bytes:
    """One that whoever knows the seed knows too; the same for the same step."""
    words = [derive(seed, "privacy noise", step, word) for word in range(_KEY_BYTES // 8)]
    return b"".join(word.to_bytes(8, "little") for word in words)


def standard_normals(key: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """[count] independent draws of N(0, 1), a function of the key; on the CPU."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.empty(_CHUNK, np.int64)
    plain = bytes(words.nbytes)
    normals = torch.empty(count, dtype=dtype)
    for begin in range(0, count, _CHUNK):
        stream.update_into(plain, words.view(np.uint8).data)
        drawn = _box_muller(torch.from_numpy(words))
        normals[begin : begin + _CHUNK] = drawn[: count - begin]
    return normals


def _box_muller(words: Tensor) -> Tensor:
    """float64 [n] from int64 [n] random words (Box and Muller 1958, Ann. Math. Statist. 29)."""
    # Never 0 or 1; the smallest gives a draw of 8.6 standard deviations.
    uniform = (words & (2**_BITS - 1)).double().add_(0.5).mul_(2.0**-_BITS)
    radius, angle = uniform.chunk(2)
    radius = radius.log_().mul_(-2.0).sqrt_()
    angle = angle.mul_(2.0 * math.pi)
    return torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])


class NoiseThread:
    """Draws noise beside the thread that computes gradients."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "tensafe-noise")

    def draw(self, count: int, dtype: torch.dtype) -> Future[Tensor]:
        """[count] under a fresh key."""
        return self._pool.submit(lambda: standard_normals(fresh_key(), count, dtype))
