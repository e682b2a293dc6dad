"""Products of many segments in few calls: padded `bmm`, and `grouped_mm` without padding.

Both hold to `products.SegmentLoop`, which is the reference. Ranks are padded to the largest with
zeros, which add nothing.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from workers.engine.products import Part, tokens_like
from workers.engine.uploads import upload

_ALIGNED = 8
"""`grouped_mm` on a GPU wants strides of 16 bytes."""


class PaddedBmm:
    """Segments padded to the longest, for many short ones of like length."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        x_SnK = _rows(inputs, parts)
        a_SrK, b_SOr = _stacked(parts, max(len(part.a) for part in parts))
        low_Snr = torch.bmm(x_SnK, a_SrK.transpose(1, 2))
        added_SnO = torch.bmm(low_Snr, b_SOr.transpose(1, 2))
        outputs += _tokens(added_SnO, parts, len(inputs)).to(outputs.dtype)
        return [low_Snr, a_SrK, b_SOr]

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        low_Snr, a_SrK, b_SOr = narrow
        x_SnK, slope_SnO = _rows(inputs, parts), _rows(grad, parts)
        grad_low_Snr = torch.bmm(slope_SnO, b_SOr)
        _add_gradients(
            parts,
            torch.bmm(grad_low_Snr.transpose(1, 2), x_SnK),
            torch.bmm(slope_SnO.transpose(1, 2), low_Snr),
        )
        if not wants:
            return None
        return _tokens(torch.bmm(grad_low_Snr, a_SrK), parts, len(inputs))


class Grouped:
    """Ragged segments in one kernel each, for GPUs."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        x_MK, ends = _gathered(inputs, parts), _ends(parts, inputs)
        longest = max(len(part.a) for part in parts)
        a_SrK, b_SOr = _stacked(parts, -(-longest // _ALIGNED) * _ALIGNED)
        low_Mr = grouped_mm(x_MK, a_SrK.transpose(1, 2), offs=ends)
        added_MO = grouped_mm(low_Mr, b_SOr.transpose(1, 2), offs=ends)
        outputs += _scattered(added_MO, parts, len(inputs)).to(outputs.dtype)
        return [low_Mr, a_SrK, b_SOr, ends]

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        low_Mr, a_SrK, b_SOr, ends = narrow
        x_MK, slope_MO = _gathered(inputs, parts), _gathered(grad, parts)
        grad_low_Mr = grouped_mm(slope_MO, b_SOr, offs=ends)
        _add_gradients(
            parts,
            grouped_mm(grad_low_Mr.t(), x_MK, offs=ends),
            grouped_mm(slope_MO.t(), low_Mr, offs=ends),
        )
        if not wants:
            return None
        return _scattered(grouped_mm(grad_low_Mr, a_SrK, offs=ends), parts, len(inputs))


def _stacked(parts: Sequence[Part], rank: int) -> tuple[Tensor, Tensor]:
    """A [S, rank, K], and B times its scale [S, O, rank]."""
    first = parts[0]
    if all(len(part.a) == rank for part in parts):
        return torch.stack([p.a for p in parts]), torch.stack([p.b * p.scale for p in parts])
    a_SrK = first.a.new_zeros(len(parts), rank, first.a.shape[1])
    b_SOr = first.a.new_zeros(len(parts), first.b.shape[0], rank)
    for index, part in enumerate(parts):
        a_SrK[index, : len(part.a)] = part.a
        b_SOr[index, :, : len(part.a)] = part.b * part.scale
    return a_SrK, b_SOr


def _add_gradients(parts: Sequence[Part], grad_a_SrK: Tensor, grad_b_SOr: Tensor) -> None:
    for index, part in enumerate(parts):
        if part.grad_a is not None and part.grad_b is not None:
            rank = len(part.a)
            part.grad_a.add_(grad_a_SrK[index, :rank])
            part.grad_b.add_(grad_b_SOr[index, :, :rank], alpha=part.scale)


def _even(parts: Sequence[Part], tokens: int) -> bool:
    """Whether the segments are all of one length and cover the pass."""
    length = parts[0].end - parts[0].begin
    return length * len(parts) == tokens and all(p.end - p.begin == length for p in parts)


def _rows(tokens: Tensor, parts: Sequence[Part]) -> Tensor:
    """[S, n, width], zeros where padded."""
    longest = max(part.end - part.begin for part in parts)
    if _even(parts, len(tokens)):
        return tokens.view(len(parts), longest, -1)
    rows = tokens.new_zeros(len(parts), longest, tokens.shape[1])
    for row, part in zip(rows, parts, strict=True):
        row[: part.end - part.begin] = tokens[part.begin : part.end]
    return rows


def _tokens(rows: Tensor, parts: Sequence[Part], count: int) -> Tensor:
    """The reverse: [N, width]."""
    if _even(parts, count):
        return rows.view(count, -1)
    tokens = tokens_like(rows, parts, count, rows.shape[2])
    for row, part in zip(rows, parts, strict=True):
        tokens[part.begin : part.end] = row[: part.end - part.begin]
    return tokens


def _gathered(tokens: Tensor, parts: Sequence[Part]) -> Tensor:
    """[M, width]: the segments' tokens without what lies between them."""
    if parts[0].begin == 0 and _touching(parts, len(tokens)):
        return tokens
    return torch.cat([tokens[part.begin : part.end] for part in parts])


def _scattered(found: Tensor, parts: Sequence[Part], count: int) -> Tensor:
    if parts[0].begin == 0 and _touching(parts, count):
        return found
    tokens = tokens_like(found, parts, count, found.shape[1])
    lengths = [part.end - part.begin for part in parts]
    for part, piece in zip(parts, torch.split(found, lengths), strict=True):
        tokens[part.begin : part.end] = piece
    return tokens


def _touching(parts: Sequence[Part], count: int) -> bool:
    ends = [part.end for part in parts]
    return [part.begin for part in parts] == [0, *ends[:-1]] and ends[-1] == count


def _ends(parts: Sequence[Part], like: Tensor) -> Tensor:
    lengths = torch.tensor([part.end - part.begin for part in parts], dtype=torch.int32)
    return upload(lengths.cumsum(0, dtype=torch.int32).numpy(), like.device)
