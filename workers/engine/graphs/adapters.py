"""The adapters of a captured pass: a frame's rows, on segments whose ends lie on the device."""

# ruff: noqa: N806 - the suffixes give shapes
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from workers.engine.dropout import PassDropout
from workers.engine.graphs.frames import Frame
from workers.engine.lora import PassAdapters
from workers.engine.products import Part, Product, SegmentLoop


class FrameAdapters(PassAdapters):
    """What a captured pass of N tokens puts on the layers.

    Args:
        ends: int32 [S], where each row's tokens end; the last row's are all that are left.
    """

    def __init__(
        self,
        frame: Frame,
        dtype: torch.dtype,
        ends: Tensor,
        tokens: int,
        dropout: PassDropout | None,
        trains: bool,
    ) -> None:
        alone = len(ends) == 1
        product: Product = SegmentLoop() if alone else _RowProduct()
        super().__init__([], dtype, product, dropout, trains)
        for module, (a_SrK, b_SOr) in frame.weights.items():
            grad_a, grad_b = frame.gradients[module] if trains else (None, None)
            if alone:
                sums = None if grad_a is None else grad_a[0], None if grad_b is None else grad_b[0]
                part = Part(0, tokens, a_SrK[0], b_SOr[0], 1.0, *sums)
            else:
                part = _Rows(0, tokens, a_SrK, b_SOr, 1.0, grad_a, grad_b, ends)
            self._parts[module] = [part]

    def parts(self, module: str) -> list[Part]:
        return self._parts.get(module, [])


@dataclass(frozen=True, slots=True)
class _Rows(Part):
    """All rows at one layer: tensors of S adapters, [S, ...] each."""

    ends: Tensor


class _RowProduct:
    """Ragged segments in one kernel each, as `Grouped`, without a loop over them."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        rows = _only(parts)
        low_Nr = grouped_mm(inputs, rows.a.transpose(1, 2), offs=rows.ends)
        outputs += grouped_mm(low_Nr, rows.b.transpose(1, 2), offs=rows.ends)
        return [low_Nr]

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        rows, (low_Nr,) = _only(parts), narrow
        grad_low_Nr = grouped_mm(grad, rows.b, offs=rows.ends)
        if rows.grad_a is not None and rows.grad_b is not None:
            rows.grad_a.add_(grouped_mm(grad_low_Nr.t(), inputs, offs=rows.ends))
            rows.grad_b.add_(grouped_mm(grad.t(), low_Nr, offs=rows.ends))
        return grouped_mm(grad_low_Nr, rows.a, offs=rows.ends) if wants else None


def _only(parts: list[Part]) -> _Rows:
    (rows,) = parts
    if not isinstance(rows, _Rows):
        raise TypeError("a captured pass has one part a layer")
    return rows
