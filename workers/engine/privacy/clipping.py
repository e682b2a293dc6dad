"""Clipping of units' gradients: min(1, C / ‖g‖)·g over the whole adapter."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 1e-6
"""What clipped gradients stay below C, relative to it: more than rounding can add."""


def clip_factors(norms_U: Tensor, bound: float) -> Tensor:  # noqa: N803
    """float64 [U]: what each gradient is multiplied by; 0 for one that is not finite."""
    factors = torch.clamp(bound * (1 - _MARGIN) / norms_U, max=1.0)
    return torch.where(torch.isfinite(norms_U), factors, 0.0)
