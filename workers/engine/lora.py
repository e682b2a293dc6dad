"""Frozen linear layers that carry the adapters of one pass: y = Wx + s·B(A(drop(x))).

The tokens of a pass are segments, each with its own adapter. The product with W takes all tokens at
once. What the adapters add and what their gradients are is one of the products in `products`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.adapters import Adapter, Pairs
from workers.engine.dividing import chooses, product
from workers.engine.dropout import PassDropout, masked, module_key
from workers.engine.privacy.gradients import UnitGradients
from workers.engine.products import Part, Product


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of a pass, and whose they are.

    Attributes:
        units: if their gradients are kept apart.
        aside: where gradients are added if not to the adapter's own.
    """

    begin: int
    end: int
    adapter: Adapter
    units: UnitGradients | None = None
    aside: Pairs | None = None

    def gradients(self) -> Pairs:
        """Module → where A's and B's gradients are added."""
        return self.adapter.gradients() if self.aside is None else self.aside


class PassAdapters:
    """The adapters of one pass.

    Args:
        segments: in the order of the tokens, without overlap.
        dtype: what the adapters' products are computed in.
        product: how the segments are computed.
        dropout: None for none.
        trains: whether backward passes add to the adapters' gradients.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        dtype: torch.dtype,
        product: Product,
        dropout: PassDropout | None = None,
        trains: bool = False,
    ) -> None:
        self.dtype = dtype
        self.product = product
        self.dropout = dropout
        self.trains = trains
        # Layers have no parameter that needs a gradient, so this makes autograd record them.
        self.anchor = torch.zeros((), requires_grad=trains)
        self._segments = [
            (
                segment,
                segment.adapter.scale(training=dropout is not None),
                segment.adapter.tensors(dtype),
                segment.gradients() if trains and segment.units is None else {},
            )
            for segment in segments
        ]
        self._parts: dict[str, list[Part]] = {}

    def parts(self, module: str) -> list[Part]:
        """The segments whose adapters target a module."""
        if module not in self._parts:
            parts: list[Part] = []
            for segment, scale, tensors, gradients in self._segments:
                if module not in tensors:
                    continue
                part = Part(
                    segment.begin,
                    segment.end,
                    *tensors[module],
                    scale,
                    *gradients.get(module, (None, None)),
                )
                units = segment.units
                parts.append(part if units is None else units.part(module, part))
            self._parts[module] = parts
        return self._parts[module]


class LoraScope:
    """What the pass at hand puts on the layers; shared by a model's layers."""

    adapters: PassAdapters | None = None


class LoraScopes(LoraScope, threading.local):
    """The same, each thread having its own pass at hand: on a CPU, where backward passes run in the
    thread that asks for them."""


class LoraLinear(nn.Linear):
    """A frozen `nn.Linear`, sharing its weight, to which a pass adds adapters.

    Args:
        linear: the layer in whose place it stands.
        name: the module's full name in the model.
        scope: shared with whoever runs the pass.
    """

    def __init__(self, linear: nn.Linear, name: str, scope: LoraScope) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self._scope = scope
        self.key = module_key(name)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` [..., K] → [..., O]; with adapters, the leading dimensions are the tokens'."""
        adapters = self._scope.adapters
        parts = adapters.parts(self.name) if adapters is not None else []
        if adapters is None or not parts:
            frozen: Tensor = (
                _Frozen.apply(inputs, self)  # type: ignore[no-untyped-call]
                if chooses()
                else nn.functional.linear(inputs, self.weight, self.bias)
            )
            return frozen
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            flat, adapters.anchor, self, adapters, parts
        )
        return outputs.view(*inputs.shape[:-1], -1)


class _Frozen(torch.autograd.Function):
    """What autograd would do, by threads of our choice both ways."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: LoraLinear) -> Tensor:
        ctx.layer = layer
        return _outputs(inputs, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _grad_inputs(grads[0], ctx.layer), None


class _Adapted(torch.autograd.Function):
    """Keeps the layer's inputs, which neighbours share, and beside them [n, r] of each segment."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,
        layer: LoraLinear,
        adapters: PassAdapters,
        parts: list[Part],
    ) -> Tensor:
        outputs = _outputs(inputs, layer)
        dropped = _cast(inputs, _bits(layer, adapters), adapters.dtype)
        narrow = product(*_sizes(inputs, parts), adapters.product.forward, dropped, parts, outputs)
        if adapters.trains:
            # Nothing of a token's in `ctx` itself, which activation checkpointing would keep.
            ctx.save_for_backward(inputs, *narrow)
            ctx.rest = layer, adapters, parts
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *narrow = ctx.saved_tensors
        layer, adapters, parts = ctx.rest
        grad = grads[0].contiguous()
        # The embeddings are frozen: below the first adapted layer nobody asks for a gradient.
        wants = ctx.needs_input_grad[0]
        bits = _bits(layer, adapters)
        added = product(
            *_sizes(inputs, parts),
            adapters.product.backward,
            _cast(inputs, bits, adapters.dtype),
            parts,
            narrow,
            grad.to(adapters.dtype),
            wants,
        )
        if added is None:
            return None, None, None, None, None
        grad_inputs = _grad_inputs(grad, layer)
        added = added.to(grad_inputs.dtype)
        grad_inputs += added if bits is None else masked(added, bits)
        return grad_inputs, None, None, None, None


def _outputs(inputs: Tensor, layer: LoraLinear) -> Tensor:
    weight, bias = layer.weight, layer.bias
    rows = inputs.numel() // layer.in_features
    return product(rows, weight.numel(), nn.functional.linear, inputs, weight, bias)


def _grad_inputs(grad: Tensor, layer: LoraLinear) -> Tensor:
    rows = grad.numel() // layer.out_features
    return product(rows, layer.weight.numel(), torch.matmul, grad, layer.weight)


def _sizes(inputs: Tensor, parts: list[Part]) -> tuple[int, int]:
    """Of the segments' products with their A: rows, and the matrix's numbers; means."""
    ranks = sum(len(part.a) for part in parts)
    return len(inputs) // len(parts), inputs.shape[1] * ranks // len(parts)


def _cast(inputs: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (inputs if bits is None else masked(inputs, bits)).to(dtype)


def _bits(layer: LoraLinear, adapters: PassAdapters) -> Tensor | None:
    """int16 [N, K]. In a backward pass of many tokens drawn anew, which is cheaper than to keep."""
    if adapters.dropout is None:
        return None
    return adapters.dropout.mask(layer.key, layer.in_features)
