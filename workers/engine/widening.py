"""A model in float32 for a moment, without room for all of it in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside, a model of a narrower type computes in float32, with its weights as they are.

    Of its layers, as `transformers` marks them, one at a time has a float32 copy of its weights.
    """
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    inside = {id(tensor) for layer in layers for tensor in _narrow(layer)}
    with ExitStack() as stack:
        stack.enter_context(_wide(one for one in _narrow(module) if id(one) not in inside))
        for layer in layers:
            stack.enter_context(_wide_while_it_computes(layer))
        yield


@contextmanager
def _wide_while_it_computes(layer: nn.Module) -> Iterator[None]:
    now = ExitStack()

    def before(_layer: nn.Module, _inputs: Any) -> None:
        now.enter_context(_wide(_narrow(layer)))

    def after(_layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        now.close()

    handles = [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        now.close()
        for handle in handles:
            handle.remove()


@contextmanager
def _wide(tensors: Iterable[Tensor]) -> Iterator[None]:
    narrow = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def _narrow(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a type narrower than float32."""
    wide = torch.finfo(torch.float32).bits
    return [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < wide
    ]
