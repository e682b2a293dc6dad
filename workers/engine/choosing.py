"""Chooses, on the device at hand, how the segments of several runs are computed."""

from __future__ import annotations

import time

import torch

from workers.engine.base_model import BaseModel
from workers.engine.batched_products import Grouped, PaddedBmm
from workers.engine.products import Part, Product, SegmentLoop

_SEGMENTS, _TOKENS, _RANK = 16, 64, 16
_ROUNDS = 5


def choose_product(model: BaseModel) -> Product:
    """The fastest on a GPU, measured; the plain loop on a CPU.

    On CPUs the loop was the fastest or nearly so, unless many segments are of one length and rank
    (docs/benchmarks.md), and a measurement there would measure who else is at work.
    """
    if model.device == "cpu":
        return SegmentLoop()
    candidates: list[Product] = [Grouped(), PaddedBmm(), SegmentLoop()]
    return min(candidates, key=lambda product: product_seconds(product, model))


def product_seconds(
    product: Product,
    model: BaseModel,
    segments: int = _SEGMENTS,
    tokens: int = _TOKENS,
    rank: int = _RANK,
) -> float:
    """Least time of a forward and backward product at the model's first layer; infinite if the
    device does not have it."""
    layer = next(iter(model.layers.values()))
    options = {"dtype": model.adapter_dtype(tokens), "device": model.device}
    inputs = torch.randn(segments * tokens, layer.in_features, **options)  # type: ignore[call-overload]
    grad = torch.randn(segments * tokens, layer.out_features, **options)  # type: ignore[call-overload]
    outputs = torch.zeros_like(grad)
    parts = []
    for index in range(segments):
        a = torch.randn(rank, layer.in_features, **options)  # type: ignore[call-overload]
        b = torch.randn(layer.out_features, rank, **options)  # type: ignore[call-overload]
        sums = torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)
        parts.append(Part(index * tokens, (index + 1) * tokens, a, b, 1.0, *sums))
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = _now(model.device)
        try:
            narrow = product.forward(inputs, parts, outputs)
            product.backward(inputs, parts, narrow, grad, True)
        except (NotImplementedError, RuntimeError):
            return float("inf")
        best = min(best, _now(model.device) - begin)
    return best


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()
