"""Documents of a pass in groups that one batched product takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from workers.engine.uploads import upload

_STEP = 16
"""What lengths are rounded up to: few different ones, and products of such sizes are faster."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring documents, padded to one length.

    How a document is padded depends on its own length alone. A product over another padded length
    adds up in another order, and in bfloat16 that shows in whole gradients.

    Attributes:
        begin, end: their tokens in the pass.
        count: n documents.
        length: T, with padding.
        filled: tokens of each document if that is one number; else None.
        places: int64 [end − begin], where each token lies in the padded [n·T]; None if `filled`
            says it.
    """

    begin: int
    end: int
    count: int
    length: int
    filled: int | None
    places: Tensor | None


@dataclass(slots=True)
class Buckets:
    """All of a pass, in order, and what its layers use again.

    Attributes:
        device: where they are computed.
    """

    members: list[Bucket]
    device: str
    _biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _scratch: Tensor | None = None

    def bias(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[T, T] of 0 where a query (row) sees a key (column), −∞ elsewhere."""
        found = self._biases.get((window, dtype))
        if found is None or len(found) < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril_()
            if window is not None:
                seen.triu_(1 - window)
            bias = torch.zeros(length, length, dtype=dtype, device=self.device)
            found = self._biases[window, dtype] = bias.masked_fill_(~seen, -torch.inf)
        return found[:length, :length]  # shorter documents see the same

    def scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """What nobody needs any more when it is asked for again: fresh memory costs more than what
        is computed in it."""
        size = math.prod(shape)
        found = self._scratch
        if found is None or found.dtype != dtype or found.numel() < size:
            found = self._scratch = torch.empty(size, dtype=dtype, device=self.device)
        return found[:size].view(shape)


def bucketed(lengths: Sequence[int], device: str) -> Buckets:
    """Groups neighbouring documents; longest-first order makes that pay."""
    members: list[Bucket] = []
    begin = 0
    for padded, group in groupby(lengths, _padded):
        own = list(group)
        end = begin + sum(own)
        filled = own[0] if len(set(own)) == 1 else None
        places = None if filled is not None else _places(own, padded, device)
        members.append(Bucket(begin, end, len(own), padded, filled, places))
        begin = end
    return Buckets(members, device)


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _places(lengths: Sequence[int], padded: int, device: str) -> Tensor:
    places = [torch.arange(length) + row * padded for row, length in enumerate(lengths)]
    return upload(torch.cat(places).numpy(), device)
