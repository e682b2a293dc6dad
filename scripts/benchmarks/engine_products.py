"""What no layout saves: the products with frozen weights, by themselves, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from workers.engine.base_model import BaseModel

_Inputs = dict[tuple[int, int], Tensor]
"""By rows and width."""

_HEAD_ROWS = 256
_RATE_ROWS_CPU, _RATE_ROWS_GPU, _RATE_ROUNDS = 1024, 16_384, 9


def product_inputs(model: BaseModel, tokens: int, scored: int) -> _Inputs:
    """What `frozen_products` multiplies: made before anything is timed."""
    found: _Inputs = {}
    for weight, rows in _products(model, tokens, scored):
        for width in weight.shape:
            if (rows, width) not in found:
                found[rows, width] = _random(rows, width, weight)
    return found


def frozen_products(model: BaseModel, inputs: _Inputs, tokens: int, scored: int) -> None:
    """The products of one training step, forward and backward, and nothing else.

    Args:
        inputs: from `product_inputs`, of the same sizes.
        tokens: that go through the layers.
        scored: that go through the head.
    """
    for weight, rows in _products(model, tokens, scored):
        linear(inputs[rows, weight.shape[1]], weight)
        inputs[rows, weight.shape[0]] @ weight


def frozen_flops(model: BaseModel, tokens: int, scored: int) -> float:
    """Operations of those products: a model's useful work, attention and adapters left out."""
    layers = sum(layer.weight.numel() for layer in model.layers.values())
    return 4.0 * (layers * tokens + model.head.weight.numel() * scored)


def _products(model: BaseModel, tokens: int, scored: int) -> list[tuple[Tensor, int]]:
    """Weights, and the rows that they are multiplied with."""
    head = [min(_HEAD_ROWS, scored - begin) for begin in range(0, scored, _HEAD_ROWS)]
    return [
        *((layer.weight, tokens) for layer in model.layers.values()),
        *((model.head.weight, rows) for rows in head),
    ]


def gigaflops(model: BaseModel, clock: Callable[[], float]) -> float:
    """Rate of the model's widest layer for many tokens: the best of some rounds."""
    weight = max((layer.weight for layer in model.layers.values()), key=lambda w: w.shape[0])
    rows = _RATE_ROWS_GPU if weight.is_cuda else _RATE_ROWS_CPU
    inputs = _random(rows, weight.shape[1], weight)
    best = float("inf")
    for _ in range(_RATE_ROUNDS):
        begin = clock()
        linear(inputs, weight)
        best = min(best, clock() - begin)
    return 2 * rows * weight.numel() / best / 1e9


def _random(rows: int, width: int, like: Tensor) -> Tensor:
    """A GPU multiplies zeros and ones faster than what models hold."""
    return torch.randn(rows, width, dtype=like.dtype, device=like.device)
