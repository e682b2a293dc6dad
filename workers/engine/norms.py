"""RMS normalisation in few passes over memory, in the place of `transformers`' modules.

A model's own module is replaced only where the result on random numbers shows that it computes one
of the known forms; any other stays as it is.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.kernels import kernel


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


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    x_ND = torch.randn(1013, 640, dtype=dtype, device=device)
    return [(x_ND, x_ND[0].clone(), 1e-5, offset) for offset in (False, True)]


def _samples_backward(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    wide = torch.promote_types(dtype, torch.float32)
    scale_N1 = torch.rand(1013, 1, dtype=wide, device=device)
    return [
        (x_ND, x_ND.clone(), scale_N1, weight_D, offset)
        for x_ND, weight_D, _, offset in _samples(device, dtype)
    ]


@kernel(_samples)
def _rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms [N, 1]."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    x = x_ND.to(wide)
    scale = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit = x * scale
    if offset:
        return unit.mul_(1 + weight_D.to(wide)).to(x_ND.dtype), scale
    return unit.to(x_ND.dtype) * weight_D, scale


@kernel(_samples_backward)
def _rms_norm_backward(
    grad_ND: Tensor, x_ND: Tensor, scale_N1: Tensor, weight_D: Tensor, offset: bool
) -> Tensor:
    """dx = (g − x̂·mean(g ∘ x̂)) / rms."""
    wide = scale_N1.dtype
    factor = 1 + weight_D.to(wide) if offset else weight_D.to(wide)
    slope = grad_ND.to(wide) * factor
    unit = x_ND.to(wide) * scale_N1
    along = (slope * unit).mean(-1, keepdim=True)
    return slope.sub_(unit.mul_(along)).mul_(scale_N1).to(x_ND.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_D: Tensor, eps: float, offset: bool) -> Tensor:
        x_ND = inputs.reshape(-1, inputs.shape[-1])
        output, scale_N1 = _rms_norm(x_ND, weight_D, eps, offset)
        ctx.save_for_backward(x_ND, scale_N1, weight_D)
        ctx.offset = offset
        return output.view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, scale_N1, weight_D = ctx.saved_tensors
        grad_ND = grads[0].reshape(x_ND.shape)
        grad = _rms_norm_backward(grad_ND, x_ND, scale_N1, weight_D, ctx.offset)
        return grad.view(grads[0].shape), None, None, None


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
