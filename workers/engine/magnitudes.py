"""How large vectors are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_NORM = 1e-15
"""Below it float32's squares may be 0."""


def l2_norms(vectors: Sequence[Tensor]) -> list[float]:
    """In one transfer from the device unless one is infinite for its squares alone, or 0; NaN or
    infinite if a number is."""
    found: list[float] = torch.stack(torch._foreach_norm(list(vectors))).tolist()
    return [
        norm if math.isfinite(norm) and norm > _LEAST_NORM else _careful(vector)
        for norm, vector in zip(found, vectors, strict=True)
    ]


def _careful(vector: Tensor) -> float:
    """Without squares that leave the range of float64."""
    largest = float(torch.linalg.vector_norm(vector, math.inf))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(vector.double() / largest))
