"""Gated feed-forward layers that keep two activations for the backward pass instead of three.

The gate's activation is computed again there: a few percent of a product's time against a third of
the layer's memory. As with the norms, a module is changed only if it is seen to compute this form.
"""

# ruff: noqa: N803, N812 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.engine.kernels import kernel

Activation = Callable[[Tensor], Tensor]


aten = torch.ops.aten
_FORMS: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(aten.gelu_backward, approximate="tanh"),
    ),
}
"""Activations whose slope is known: of a gradient and the activation's input."""


def lean_gates(module: nn.Module) -> int:
    """Changes the gated layers of a frozen model; returns how many."""
    changed = 0
    for part in module.modules():
        if _is_gated(part) and _equal(part, form := _form(part)):
            part.forward = partial(_forward, part, form)
            changed += 1
    return changed


def _forward(layer: Any, form: str | None, inputs: Tensor) -> Tensor:
    """down(act(gate(x)) ∘ up(x)) (Shazeer 2020, arXiv 2002.05202)."""
    gate: Any = _Gate if form is None else _KnownGate
    product = gate.apply(layer.gate_proj(inputs), layer.up_proj(inputs), form or layer.act_fn)
    output: Tensor = layer.down_proj(product)
    return output


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    gate = torch.randn(1013, 1536, dtype=dtype, device=device)
    return [(gate, gate.clone(), form) for form in _FORMS]


def _samples_backward(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(gate.clone(), gate, up, form) for gate, up, form in _samples(device, dtype)]


@kernel(_samples)
def _gate(gate_NF: Tensor, up_NF: Tensor, form: str) -> Tensor:
    return _FORMS[form][0](gate_NF) * up_NF


@kernel(_samples_backward)
def _gate_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    activation, slope = _FORMS[form]
    return slope(grad_NF * up_NF, gate_NF), grad_NF * activation(gate_NF)


class _KnownGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, form: str) -> Tensor:
        flat = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        ctx.save_for_backward(*flat)
        ctx.form = form
        return _gate(*flat, form).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        found = _gate_backward(grads[0].reshape(gate.shape), gate, up, ctx.form)
        grad_gate, grad_up = (grad.view(grads[0].shape) for grad in found)
        return grad_gate, grad_up, None


class _Gate(torch.autograd.Function):
    """Any other activation, its slope by autograd."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(active, leaf, grads[0] * up)
        return grad_gate, grads[0] * active.detach(), None


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names) and callable(
        getattr(module, "act_fn", None)
    )


@torch.no_grad()
def _form(layer: Any) -> str | None:
    """Which known activation the layer's gives the bits of, if one."""
    weight = layer.gate_proj.weight
    sample = torch.linspace(-9, 9, 999, device=weight.device, dtype=weight.dtype)
    found = layer.act_fn(sample)
    for name, (activation, _) in _FORMS.items():
        if torch.equal(activation(sample), found):
            return name
    return None


@torch.no_grad()
def _equal(layer: Any, form: str | None) -> bool:
    weight = layer.gate_proj.weight
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight)
    # Large numbers too, where a clamp is seen.
    sample = torch.cat([sample, 1000 * sample], 1)
    ours = _forward(layer, form, sample)
    return torch.allclose(layer(sample), ours, rtol=0, atol=0, equal_nan=True)
