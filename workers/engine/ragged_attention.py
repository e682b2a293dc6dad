"""Attention by the flash kernel for ragged documents, on GPUs that have it."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_WIDEST_HEAD = 256


def has_ragged_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether flash attention takes them: half precision, heads of up to 256, a GPU of 2020 on.

    Args:
        width: of a head.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and width <= _WIDEST_HEAD
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def ragged_attention(
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    borders: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """[N, H, F]: the GPU's kernel for ragged documents, without padding.

    Args:
        borders: int32 [R + 1], cumulative lengths.
        longest: of them.
        window: how many tokens each one sees, itself among them; None for all.
    """
    from torch.nn.attention.varlen import varlen_attn

    # It knows one width.
    width, own = v_NGE.shape[2], max(q_NHE.shape[2], v_NGE.shape[2])
    q_NHE, k_NGE, v_NGE = (
        part if part.shape[2] == own else pad(part, (0, own - part.shape[2]))
        for part in (q_NHE, k_NGE, v_NGE)
    )
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {}
    if "enable_gqa" in _varlen_options():  # older ones group heads without being told
        options["enable_gqa"] = q_NHE.shape[1] != k_NGE.shape[1]
    output = varlen_attn(
        q_NHE.contiguous(),
        k_NGE.contiguous(),
        v_NGE.contiguous(),
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0),
        **options,
    )
    if not isinstance(output, Tensor):
        raise TypeError("varlen_attn gave more than its output")
    return output[..., :width]


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
