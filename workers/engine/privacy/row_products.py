"""The gradient's products of rows, each with the bits that it has alone."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

_NARROW = (torch.bfloat16, torch.float16)
_ALIGNED = 16
"""Bytes of which `grouped_mm` wants strides to be a multiple."""


def row_products(left_OM: Tensor, right_MK: Tensor, lengths: Sequence[int]) -> Tensor:
    """[n, O, K]: the product of each of n rows, end to end in M tokens.

    Who lies beside a row is to round nothing otherwise. So one batched product is taken only where
    it gives the bits of n single ones, and rows of wide types are copied first: of those, how a
    CPU's library adds up depends on where in memory they begin.

    Args:
        left_OM: the transpose of a contiguous one.
    """
    rows, kind = len(lengths), (left_OM.dtype, left_OM.device)
    if (
        rows > 1
        and left_OM.dtype in _NARROW
        and len(set(lengths)) == 1
        and _are_alike(rows, lengths[0], len(left_OM), right_MK.shape[1], *kind)
    ):
        return _stacked(left_OM, right_MK, rows)
    return _single(left_OM, right_MK, lengths)


def _single(left_OM: Tensor, right_MK: Tensor, lengths: Sequence[int]) -> Tensor:
    if _is_grouped_on_the_cpu(left_OM, right_MK):
        # One call for a loop of the same products.
        ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return grouped_mm(left_OM, right_MK, offs=ends)
    out_nOK = left_OM.new_empty(len(lengths), len(left_OM), right_MK.shape[1])
    rows = left_OM.split_with_sizes(list(lengths), 1), right_MK.split_with_sizes(list(lengths))
    for left, right, out in zip(*rows, out_nOK.unbind(), strict=True):
        if left.dtype in _NARROW:
            torch.mm(left, right, out=out)
        else:
            out.copy_(left.clone() @ right.clone())
    return out_nOK


def _is_grouped_on_the_cpu(left_OM: Tensor, right_MK: Tensor) -> bool:
    widths = len(left_OM), right_MK.shape[1]
    return (
        left_OM.device.type == "cpu"
        and left_OM.dtype in _NARROW
        and all(width * left_OM.element_size() % _ALIGNED == 0 for width in widths)
    )


def _stacked(left_OM: Tensor, right_MK: Tensor, rows: int) -> Tensor:
    left_OnT, right_nTK = (
        left_OM.view(len(left_OM), rows, -1),
        right_MK.view(rows, -1, right_MK.shape[1]),
    )
    return torch.bmm(left_OnT.transpose(0, 1), right_nTK)


@lru_cache(maxsize=4096)
def _are_alike(
    rows: int, length: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether both ways give the same bits at this shape: of random numbers, adding them up in
    another order does not."""
    generator = torch.Generator().manual_seed(0)
    left_MO, right_MK = (
        torch.randn(rows * length, size, generator=generator).to(device, dtype)
        for size in (height, width)
    )
    single = _single(left_MO.t(), right_MK, [length] * rows)
    return torch.equal(_stacked(left_MO.t(), right_MK, rows), single)
