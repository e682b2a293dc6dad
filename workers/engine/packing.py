"""Documents laid end to end: each token attends to its own document up to itself."""

# ruff: noqa: N803 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.bucket_attention import bucket_attention
from workers.engine.buckets import Buckets, bucketed
from workers.engine.ragged_attention import has_ragged_kernel, ragged_attention
from workers.engine.uploads import upload


@dataclass(slots=True)
class Packing:
    """Where the documents of one pass begin and end.

    Attributes:
        borders: int32 [R + 1], cumulative lengths, on the device.
        longest: tokens of the longest document.
        buckets: the documents in groups, for devices without a kernel for ragged ones.
        keep: takes each layer's number, keys and values, for whoever goes on from here.
    """

    borders: Tensor
    longest: int
    buckets: Buckets
    keep: Callable[[int, Tensor, Tensor], None] | None = None

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See `attention.Layout`."""
        if self.keep is not None:
            self.keep(module.layer_idx, k_NGE, v_NGE)
        if has_ragged_kernel(q_NHE.device, q_NHE.dtype, max(q_NHE.shape[2], v_NGE.shape[2])):
            return ragged_attention(q_NHE, k_NGE, v_NGE, self.borders, self.longest, scale, window)
        return bucket_attention(q_NHE, k_NGE, v_NGE, self.buckets, scale, window)


def pack(lengths: Sequence[int], device: str) -> Packing:
    """Documents of these lengths, in this order."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packing(upload(borders.numpy(), device), max(lengths), bucketed(lengths, device))
