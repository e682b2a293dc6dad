"""Clipping of units' gradients: min(1, C / ‖g‖)·g over the whole adapter."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128
"""Numbers whose squares are added in one go. In float32 a norm over millions of numbers is off by
up to 5e-4 of itself (measured, one of them large); over so few it is exact to 1e-6 whatever they
are, and blocks are added in float64."""
_MARGIN = 1e-6
"""What clipped gradients stay below C, relative to it: more than rounding can add."""


def squared_norms(values_UN: Tensor) -> Tensor:  # noqa: N803 - the suffixes give shapes
    """float64 [U]: Σ x² of each row; NaN or infinite if one of its numbers is."""
    whole = values_UN.shape[1] // _BLOCK * _BLOCK
    blocks = values_UN[:, :whole].unflatten(1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    squares: Tensor = torch.linalg.vector_norm(blocks, dim=2).double().square_().sum(1)
    rest = torch.linalg.vector_norm(values_UN[:, whole:], dim=1)
    return squares.add_(rest.double().square_())


def clip_factors(norms_U: Tensor, bound: float) -> Tensor:  # noqa: N803
    """float64 [U]: what each gradient is multiplied by; 0 for one that is not finite."""
    factors = torch.clamp(bound * (1 - _MARGIN) / norms_U, max=1.0)
    return torch.where(torch.isfinite(norms_U), factors, 0.0)
