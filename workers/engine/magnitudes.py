"""How large vectors are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 128
"""Numbers whose squares are added in one go. A CPU's norm of 10 million numbers in float32 is off
by 4e-4 of itself, of 100 million by 1e-2; of so few it is exact to 1e-6 whatever they are, and
blocks are added in float64."""
_LEAST_NORM = 1e-15
"""Below it float32's squares may be 0."""


def squared_norms(values_UN: Tensor) -> Tensor:  # noqa: N803 - the suffixes give shapes
    """float64 [U]: Σ x² of each row; NaN or infinite if one of its numbers is, or its square."""
    whole = values_UN.shape[1] // _BLOCK * _BLOCK
    blocks = values_UN[:, :whole].unflatten(1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    squares: Tensor = torch.linalg.vector_norm(blocks, dim=2).double().square_().sum(1)
    rest = torch.linalg.vector_norm(values_UN[:, whole:], dim=1)
    return squares.add_(rest.double().square_())


def l2_norm(vector: Tensor) -> Tensor:
    """float64 [], on the vector's device; `certain` if its squares stay in its type's range."""
    return squared_norms(vector.view(1, -1)).sqrt_()[0]


def certain(norm: float, vector: Tensor) -> float:
    """What `l2_norm` found; found anew if it is infinite for squares alone, or 0. NaN or infinite
    if a number is."""
    if math.isfinite(norm) and norm > _LEAST_NORM:
        return norm
    # Without squares that leave the range of float64.
    largest = float(torch.linalg.vector_norm(vector, math.inf))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(vector.double() / largest))


def l2_norms(vectors: Sequence[Tensor]) -> list[float]:
    """In one transfer from the device, unless one is not `certain`."""
    found: list[float] = torch.stack([l2_norm(vector) for vector in vectors]).tolist()
    return [certain(norm, vector) for norm, vector in zip(found, vectors, strict=True)]
