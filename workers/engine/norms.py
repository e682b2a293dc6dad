"""RMS normalisation in few passes over memory, in the place of `transformers`' modules.

A model's own module is replaced only where the result on random numbers shows that it computes one
of the known forms; any other stays as it is.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """y = x / √(mean(x²) + ε) · w (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    Args:
        weight: [D], frozen.
        offset: form of the scale: w rounded product, as in Llama, or 1 + w in float32, as in Gemma.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: bool) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        output: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, self.weight, self.eps, self.offset
        )
        return output


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        x = x_ND.to(wide)
        scale = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(x_ND, scale, weight_D)
        ctx.offset = offset
        if offset:
            return unit.mul_(1 + weight_D.to(wide)).to(x_ND.dtype)
        return unit.to(x_ND.dtype) * weight_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, scale, weight_D = ctx.saved_tensors
        wide = scale.dtype
        factor = 1 + weight_D.to(wide) if ctx.offset else weight_D.to(wide)
        slope = grads[0].to(wide) * factor
        unit = x_ND.to(wide) * scale
        # dx = (g − x̂·mean(g ∘ x̂)) / rms
        along = (slope * unit).mean(-1, keepdim=True)
        grad = slope.sub_(unit.mul_(along)).mul_(scale)
        return grad.to(x_ND.dtype), None, None, None


def lean_norms(module: nn.Module) -> int:
    """Replaces the norms of a frozen model; returns how many."""
    found = [(name, part) for name, part in module.named_modules() if _is_rms_norm(part)]
    replaced = 0
    for name, norm in found:
        lean = _equal_form(norm)
        if lean is not None:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, lean)
            replaced += 1
    return replaced


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


@torch.no_grad()
def _equal_form(norm: nn.Module) -> RmsNorm | None:
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if not isinstance(weight, nn.Parameter) or eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    sample = 3 * torch.randn(4, len(weight), generator=generator)
    # Small numbers too, where ε is seen.
    sample = torch.cat([sample, sample * eps**0.5]).to(weight.device, weight.dtype)
    expected = norm(sample)
    tolerance = 2 * torch.finfo(weight.dtype).eps
    for offset in (False, True):
        lean = RmsNorm(weight, eps, offset)
        if torch.allclose(lean(sample), expected, rtol=tolerance, atol=tolerance):
            return lean
    return None
