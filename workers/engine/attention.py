"""Attention over documents laid end to end: each token sees its own document up to itself.

Registered with `transformers` as `tensafe`, so that its decoder models work unchanged. A call that
brings a `packing` runs here, or in whatever other layout of tokens that is; any other call is
`transformers`' own SDPA.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workers.engine.uploads import upload

NAME = "tensafe"

_DENSE_LENGTH = 576
"""Longest document whose whole [T, T] is held; beyond it the flash kernel's memory is worth it."""
_LEAST_FILL = 0.85
_SMALL_BUCKET = 2**15
_WIDEST_HEAD = 256
_APART_STEP = 16
"""What lengths are rounded up to where padding may not depend on neighbours: few different ones."""


class Layout(Protocol):
    """How the tokens of a pass belong together."""

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[N, H, E] of one layer; the values' E may differ from that of queries and keys.

        Args:
            module: the layer's own attention module, with its `layer_idx`.
            window: how many tokens each one sees, itself among them; None for all.
        """


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring documents of like length, padded to the longest for one batched product.

    Attributes:
        begin, end: their tokens in the pass.
        count: n documents.
        length: T, of the longest.
        places: int64 [end − begin], where each token lies in the padded [n·T]; None if all
            documents have length T.
    """

    begin: int
    end: int
    count: int
    length: int
    places: Tensor | None


@dataclass(slots=True)
class Packing:
    """Where the documents of one pass begin and end.

    Attributes:
        borders: int32 [R + 1], cumulative lengths, on the device.
        longest: tokens of the longest document.
        buckets: what is computed together, in the order of the documents.
        keep: takes each layer's number, keys and values, for whoever goes on from here.
    """

    borders: Tensor
    longest: int
    buckets: list[Bucket]
    keep: Callable[[int, Tensor, Tensor], None] | None = None
    _biases: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See `Layout`."""
        if self.keep is not None:
            self.keep(module.layer_idx, k_NGE, v_NGE)
        if has_ragged_kernel(q_NHE.device, q_NHE.dtype, max(q_NHE.shape[2], v_NGE.shape[2])):
            return _varlen(q_NHE, k_NGE, v_NGE, self, scale, window)
        return _bucketed(q_NHE, k_NGE, v_NGE, self, scale, window)

    def bias(self, length: int, window: int | None, like: Tensor) -> Tensor:
        """[T, T] of 0 where a query (row) sees a key (column), −∞ elsewhere."""
        key = (length, window)
        if key not in self._biases:
            seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril_()
            if window is not None:
                seen.triu_(1 - window)
            bias = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            self._biases[key] = bias.masked_fill_(~seen, -torch.inf)
        return self._biases[key]


def pack(lengths: Sequence[int], device: str, *, apart: bool = False) -> Packing:
    """Groups neighbouring documents of like length; longest-first order makes that pay.

    Args:
        apart: how a document is padded depends on its own length alone. A product over another
            padded length adds up in another order, and in bfloat16 that shows in whole gradients.
    """
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    buckets: list[Bucket] = []
    padded = [-(-length // _APART_STEP) * _APART_STEP if apart else length for length in lengths]
    begin = first = 0
    while first < len(lengths):
        last = first + 1
        longest = padded[first]
        while last < len(lengths) and (
            padded[last] == longest if apart else _joins(lengths[last], longest, last - first)
        ):
            last += 1
        end = begin + sum(lengths[first:last])
        places = _places(lengths[first:last], longest, device)
        buckets.append(Bucket(begin, end, last - first, longest, places))
        begin, first = end, last
    return Packing(upload(borders.numpy(), device), max(lengths), buckets)


def _joins(length: int, longest: int, count: int) -> bool:
    if length > longest:
        return False
    # Small products cost their calls, not their padding.
    return length >= _LEAST_FILL * longest or (count + 1) * longest**2 <= _SMALL_BUCKET


def _places(lengths: Sequence[int], longest: int, device: str) -> Tensor | None:
    if all(length == longest for length in lengths):
        return None
    places = [torch.arange(length) + row * longest for row, length in enumerate(lengths)]
    return upload(torch.cat(places).numpy(), device)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention interface: [1, H, N, E] in, [1, N, H, E] out."""
    if packing is None:
        if sliding_window is not None:
            options["sliding_window"] = sliding_window
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    names = ("softcap", "s_aux", "position_bias")
    refused = [name for name in names if options.get(name) is not None]
    if refused or not options.get("is_causal", getattr(module, "is_causal", True)):
        lacking = ", ".join(refused) or "two-way attention"
        raise NotImplementedError(f"packed attention has no {lacking}; use a model without it")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_NHE, k_NGE, v_NGE = (part[0].transpose(0, 1) for part in (query, key, value))
    return packing.attend(module, q_NHE, k_NGE, v_NGE, scale, sliding_window)[None], None


def register() -> None:
    """Makes the name known to `transformers`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


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


def _varlen(
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
) -> Tensor:
    """The GPU's kernel for ragged documents, without padding."""
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = packing.borders, packing.longest
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


def _bucketed(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    """Any device's way, and the CPU's: bucket by bucket, plain products for short documents, SDPA
    for long ones.

    Measured on SmolLM2 (docs/benchmarks.md): the flash kernel's backward pass costs several times
    the plain products' for rows of a few hundred tokens.
    """
    sizes = [bucket.end - bucket.begin for bucket in packing.buckets]
    parts = (torch.split(part, sizes) for part in (q_NHE, k_NGE, v_NGE))
    found: list[Tensor] = []
    for bucket, q, k, v in zip(packing.buckets, *parts, strict=True):
        if bucket.length > _DENSE_LENGTH:
            found.append(_long(q, k, v, bucket, packing, scale, window))
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            bias_TT = packing.bias(bucket.length, window, q.new_empty(0, dtype=wide))
            found.append(_Dense.apply(q, k, v, bucket, bias_TT, scale))  # type: ignore[no-untyped-call]
    return found[0] if len(found) == 1 else torch.cat(found)


def _rows(tokens_MHE: Tensor, bucket: Bucket) -> Tensor:
    """A bucket's tokens as padded rows [n, H, T, E], zeros where padded."""
    if bucket.places is not None:
        padded = tokens_MHE.new_zeros(bucket.count * bucket.length, *tokens_MHE.shape[1:])
        tokens_MHE = padded.index_copy_(0, bucket.places, tokens_MHE)
    shape = bucket.count, bucket.length, *tokens_MHE.shape[1:]
    return tokens_MHE.view(shape).transpose(1, 2)


def _tokens(rows_nHTE: Tensor, bucket: Bucket) -> Tensor:
    """The reverse."""
    flat = rows_nHTE.transpose(1, 2).flatten(0, 1)
    return flat if bucket.places is None else flat.index_select(0, bucket.places)


class _Dense(torch.autograd.Function):
    """Softmax(QKᵀ)V with its probabilities kept, the heads of a group folded into the rows.

    Scores and softmax are in float32 at least; probabilities are kept in the inputs' type. Padded
    keys lie to the right of every real query, so causality hides them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_MHE: Tensor,
        k_MGE: Tensor,
        v_MGF: Tensor,
        bucket: Bucket,
        bias_TT: Tensor,
        scale: float,
    ) -> Tensor:
        n, T, G = bucket.count, bucket.length, k_MGE.shape[1]
        H, E, F = q_MHE.shape[1], q_MHE.shape[2], v_MGF.shape[2]
        q = _rows(q_MHE, bucket).reshape(n * G, H // G * T, E)
        k = _rows(k_MGE, bucket).reshape(n * G, T, E)
        v = _rows(v_MGF, bucket).reshape(n * G, T, F)
        scores = torch.bmm(q.to(bias_TT.dtype), k.to(bias_TT.dtype).transpose(1, 2)).mul_(scale)
        scores.view(n * G, H // G, T, T).add_(bias_TT)
        probabilities = torch.softmax(scores, -1).to(q.dtype)
        if any(ctx.needs_input_grad):
            # Nothing of it in `ctx` itself, which activation checkpointing would keep.
            ctx.save_for_backward(q, k, v, probabilities)
            ctx.bucket, ctx.scale = bucket, scale
        return _tokens(torch.bmm(probabilities, v).view(n, H, T, F), bucket)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        bucket = ctx.bucket
        n, T = bucket.count, bucket.length
        grad = _rows(grads[0], bucket).reshape(*q.shape[:2], v.shape[-1])
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
        slope = torch.bmm(grad, v.transpose(1, 2))
        # dS = P ∘ (dP − rowsum(dP ∘ P))
        slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
        slope *= ctx.scale
        grad_q = torch.bmm(slope, k)
        grad_k = torch.bmm(slope.transpose(1, 2), q)
        G = k.shape[0] // n
        return (
            _tokens(grad_q.view(n, -1, T, q.shape[-1]), bucket),
            _tokens(grad_k.view(n, G, T, -1), bucket),
            _tokens(grad_v.view(n, G, T, -1), bucket),
            None,
            None,
            None,
        )


def _long(
    q_MHE: Tensor,
    k_MGE: Tensor,
    v_MGF: Tensor,
    bucket: Bucket,
    packing: Packing,
    scale: float,
    window: int | None,
) -> Tensor:
    """`torch`'s SDPA, whose flash kernel holds no [T, T]."""
    q, k, v = (_rows(part, bucket) for part in (q_MHE, k_MGE, v_MGF))
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    mask = None if window is None else packing.bias(bucket.length, window, q)
    rows = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return _tokens(rows, bucket)
