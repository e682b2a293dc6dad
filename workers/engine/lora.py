"""Frozen linear layers that carry the adapters of one pass: y = Wx + s·B(A(drop(x))).

The tokens of a pass are segments, each with its own adapter. The product with W takes all tokens at
once. What the adapters add and what their gradients are is one of the products in `products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.adapters import Adapter
from workers.engine.dropout import PassDropout, masked, module_key
from workers.engine.privacy.gradients import UnitGradients
from workers.engine.products import Part, Product


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of a pass, and whose they are; `units` if gradients are kept apart."""

    begin: int
    end: int
    adapter: Adapter
    units: UnitGradients | None = None


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
                segment.adapter.gradients() if trains and segment.units is None else {},
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
                    tensors[module][0],
                    tensors[module][1] * scale,
                    scale,
                    *gradients.get(module, (None, None)),
                )
                units = segment.units
                parts.append(part if units is None else units.part(module, part))
            self._parts[module] = parts
        return self._parts[module]


@dataclass(slots=True)
class LoraScope:
    """What the pass at hand puts on the layers; shared by a model's layers."""

    adapters: PassAdapters | None = None


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
            return nn.functional.linear(inputs, self.weight, self.bias)
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            flat, adapters.anchor, self, adapters, parts
        )
        return outputs.view(*inputs.shape[:-1], -1)


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
        outputs = nn.functional.linear(inputs, layer.weight, layer.bias)
        dropped = _cast(inputs, _bits(layer, adapters), adapters.dtype)
        narrow = adapters.product.forward(dropped, parts, outputs)
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
        added = adapters.product.backward(
            _cast(inputs, bits, adapters.dtype), parts, narrow, grad.to(adapters.dtype), wants
        )
        if added is None:
            return None, None, None, None, None
        grad_inputs = grad @ layer.weight
        added = added.to(grad_inputs.dtype)
        grad_inputs += added if bits is None else masked(added, bits)
        return grad_inputs, None, None, None, None


def _cast(inputs: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (inputs if bits is None else masked(inputs, bits)).to(dtype)


def _bits(layer: LoraLinear, adapters: PassAdapters) -> Tensor | None:
    """int16 [N, K]. In a backward pass of many tokens drawn anew, which is cheaper than to keep."""
    if adapters.dropout is None:
        return None
    return adapters.dropout.mask(layer.key, layer.in_features)
