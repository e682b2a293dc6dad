"""Attention bucket by bucket, on any device: plain products for short documents, SDPA for long.

Measured on SmolLM2 (docs/benchmarks.md): the flash kernel's backward pass costs several times the
plain products' for rows of a few hundred tokens.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workers.engine.buckets import Bucket, Buckets

_DENSE_LENGTH = 576
"""Longest document whose whole [T, T] is held; beyond it the flash kernel's memory is worth it."""


def bucket_attention(
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGF: Tensor,
    buckets: Buckets,
    scale: float,
    window: int | None,
) -> Tensor:
    """[N, H, F] of a pass.

    Args:
        buckets: of all its tokens.
        window: how many tokens each one sees, itself among them; None for all.
    """
    # Scores and softmax are in float32 at least.
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    found: list[Tensor] = []
    for is_long, group in groupby(buckets.members, lambda bucket: bucket.length > _DENSE_LENGTH):
        members = list(group)
        tokens = slice(members[0].begin, members[-1].end)
        q, k, v = q_NHE[tokens], k_NGE[tokens], v_NGF[tokens]
        if is_long:
            for bucket, own in zip(members, _places(members), strict=True):
                mask = None if window is None else buckets.bias(bucket.length, window, q.dtype)
                found.append(_long(q[own], k[own], v[own], bucket, mask, scale))
        else:
            biases = [buckets.bias(each.length, window, wide) for each in members]
            found.append(_Dense.apply(q, k, v, members, biases, buckets.scratch, scale))  # type: ignore[no-untyped-call]
    return found[0] if len(found) == 1 else torch.cat(found)


class _Dense(torch.autograd.Function):
    """softmax(scale·QKᵀ + bias)V of neighbouring buckets, the heads of a group folded into rows.

    Probabilities are kept, in the inputs' type. Padded keys lie to the right of every real query,
    so causality hides them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_MHE: Tensor,
        k_MGE: Tensor,
        v_MGF: Tensor,
        buckets: Sequence[Bucket],
        biases_TT: Sequence[Tensor],
        scratch: Callable[..., Tensor],
        scale: float,
    ) -> Tensor:
        M, H, E = q_MHE.shape
        G, F = v_MGF.shape[1:]
        outputs = q_MHE.new_empty(M, H, F)
        kept: list[Tensor] = []
        for bucket, own, bias_TT in zip(buckets, _places(buckets), biases_TT, strict=True):
            n, T = bucket.count, bucket.length
            q = _rows(q_MHE[own], bucket).view(n * G, H // G * T, E)
            k = _rows(k_MGE[own], bucket).view(n * G, T, E)
            v = _rows(v_MGF[own], bucket).view(n * G, T, F)
            wide = bias_TT.dtype
            scores = scratch(wide, n * G, H // G * T, T)
            torch.bmm(q.to(wide, copy=True).mul_(scale), k.to(wide).transpose(1, 2), out=scores)
            scores.view(n * G, H // G, T, T).add_(bias_TT)
            probabilities = torch.softmax(scores, -1, out=scores).to(q.dtype, copy=True)
            _put(torch.bmm(probabilities, v).view(n, H, T, F), bucket, outputs[own])
            kept += q, k, v, probabilities
        if any(ctx.needs_input_grad):
            # Nothing of it in `ctx` itself, which activation checkpointing would keep.
            ctx.save_for_backward(*kept)
            ctx.buckets, ctx.scale = buckets, scale
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, buckets = iter(ctx.saved_tensors), ctx.buckets
        M, H, F = grads[0].shape
        found: list[Tensor] = []
        for bucket, own in zip(buckets, _places(buckets), strict=True):
            q, k, v, probabilities = (next(kept) for _ in range(4))
            n, T, E = bucket.count, bucket.length, q.shape[-1]
            G = len(k) // n
            if not found:
                shapes = (H, E), (G, E), (G, F)
                found = [grads[0].new_empty(M, heads, width) for heads, width in shapes]
            grad_q, grad_k, grad_v = (grad[own] for grad in found)
            grad = _rows(grads[0][own], bucket).view(n * G, H // G * T, F)
            _put(torch.bmm(probabilities.transpose(1, 2), grad).view(n, G, T, F), bucket, grad_v)
            slope = torch.bmm(grad, v.transpose(1, 2))
            # dS = P ∘ (dP − rowsum(dP ∘ P))
            torch._softmax_backward_data(slope, probabilities, -1, slope.dtype, grad_input=slope)
            _put(torch.bmm(slope, k).view(n, H, T, E), bucket, grad_q)
            _put(torch.bmm(slope.transpose(1, 2), q).view(n, G, T, E), bucket, grad_k)
        # Fewer numbers than the slopes of all scores.
        for found_grad in found[:2]:
            found_grad.mul_(ctx.scale)
        return *found, None, None, None, None


def _places(buckets: Sequence[Bucket]) -> list[slice]:
    """Where each bucket's tokens lie among theirs."""
    first = buckets[0].begin
    return [slice(bucket.begin - first, bucket.end - first) for bucket in buckets]


def _rows(tokens_MHE: Tensor, bucket: Bucket) -> Tensor:
    """A bucket's tokens as padded rows [n, H, T, E], zeros where padded."""
    n, T, filled = bucket.count, bucket.length, bucket.filled
    _, H, E = tokens_MHE.shape
    if bucket.places is not None:
        padded = tokens_MHE.new_zeros(n * T, H, E).index_copy_(0, bucket.places, tokens_MHE)
        return padded.view(n, T, H, E).transpose(1, 2).contiguous()
    rows = tokens_MHE.new_empty(n, H, T, E)
    rows[:, :, filled:] = 0.0
    own = tokens_MHE.unflatten(0, (n, filled))  # type: ignore[no-untyped-call]
    rows[:, :, :filled] = own.transpose(1, 2)
    return rows


def _put(rows_nHTE: Tensor, bucket: Bucket, tokens_MHE: Tensor) -> None:
    """The reverse, into their places."""
    if bucket.places is not None:
        flat = rows_nHTE.transpose(1, 2).flatten(0, 1)
        torch.index_select(flat, 0, bucket.places, out=tokens_MHE)
    else:
        n, filled = bucket.count, bucket.filled
        tokens = tokens_MHE.unflatten(0, (n, filled))  # type: ignore[no-untyped-call]
        tokens.copy_(rows_nHTE[:, :, :filled].transpose(1, 2))


def _long(
    q_MHE: Tensor,
    k_MGE: Tensor,
    v_MGF: Tensor,
    bucket: Bucket,
    mask_TT: Tensor | None,
    scale: float,
) -> Tensor:
    """`torch`'s SDPA, whose flash kernel holds no [T, T]."""
    q, k, v = (_rows(part, bucket) for part in (q_MHE, k_MGE, v_MGF))
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    rows_nHTF = scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TT, is_causal=mask_TT is None, scale=scale
    )
    if bucket.places is None:
        return rows_nHTF[:, :, : bucket.filled].transpose(1, 2).flatten(0, 1)
    return rows_nHTF.transpose(1, 2).flatten(0, 1).index_select(0, bucket.places)
