"""The ways to compute the segments of several adapters, at one layer of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.engine import wall_clock
from workers.engine.base_model import BaseModel
from workers.engine.batched_products import Grouped, PaddedBmm
from workers.engine.products import Part, Product, SegmentLoop

WAYS: dict[str, Product] = {
    "loop": SegmentLoop(),
    "bmm": PaddedBmm(),
    "grouped_mm": Grouped(),
}
CELLS = ((8, 16, False), (8, 16, True), (8, 64, True), (32, 16, False), (32, 64, False))
"""Segments, tokens of each (on average), and whether lengths and ranks are mixed."""
_RANK = 16
_ROUNDS = 21


def measure(model: BaseModel) -> dict[str, list[float]]:
    """Seconds of a forward and backward product by `segments/CELL/WAY`, of CPU time on a CPU."""
    clock = time.process_time if model.device == "cpu" else wall_clock
    found: dict[str, list[float]] = {}
    for segments, tokens, mixed in CELLS:
        cell = f"segments/{segments}x{tokens} {'mixed' if mixed else 'equal'}"
        steps = _steps(model, segments, tokens, mixed)
        for step in steps.values():
            step()
        for turn in range(_ROUNDS):
            for way, step in list(steps.items())[:: 1 if turn % 2 == 0 else -1]:
                begin = clock()
                step()
                found.setdefault(f"{cell}/{way}", []).append(clock() - begin)
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """How many times the loop's time each other way takes."""
    result = {}
    for name, seconds in found.items():
        cell, _, way = name.rpartition("/")
        if way != "loop":
            pairs = zip(seconds, found[f"{cell}/loop"], strict=True)
            result[f"{cell} {way}/loop"] = median(own / loop for own, loop in pairs)
    return result


def _steps(
    model: BaseModel, segments: int, tokens: int, mixed: bool
) -> dict[str, Callable[[], None]]:
    layer = next(iter(model.layers.values()))
    lengths = [tokens] * segments
    ranks = [_RANK] * segments
    if mixed:
        lengths = [tokens * (1 + index % 4) // 2 for index in range(segments)]
        ranks = [4 << index % 4 for index in range(segments)]
    dtype = model.adapter_dtype(min(lengths))

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=model.device)

    inputs = random(sum(lengths), layer.in_features)
    grad = random(sum(lengths), layer.out_features)
    outputs = torch.zeros_like(grad, dtype=model.dtype)
    parts, begin = [], 0
    for length, rank in zip(lengths, ranks, strict=True):
        a, b = random(rank, layer.in_features), random(layer.out_features, rank)
        sums = torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)
        parts.append(Part(begin, begin + length, a, b, 1.0, *sums))
        begin += length

    def step(product: Product) -> Callable[[], None]:
        def both() -> None:
            narrow = product.forward(inputs, parts, outputs)
            product.backward(inputs, parts, narrow, grad, True)

        return both

    return {way: step(product) for way, product in WAYS.items()}
