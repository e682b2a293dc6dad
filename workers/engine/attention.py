"""Attention over documents laid end to end: each token sees its own document up to itself.

Registered with `transformers` as `tensafe`, so that its decoder models work unchanged. A call that
brings a `packing` runs here, or in whatever other layout of tokens that is; any other call is
`transformers`' own SDPA.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tensafe"

_DENSE_LENGTH = 576
"""Longest document whose whole [T, T] is held; beyond it the flash kernel's memory is worth it."""
_LEAST_FILL = 0.85
_SMALL_BUCKET = 2**15
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
        """[N, H, E] of one layer.

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
        if q_NHE.is_cuda:
            return _varlen(q_NHE, k_NGE, v_NGE, self, scale, window)
        output: Tensor = _Bucketed.apply(  # type: ignore[no-untyped-call]
            q_NHE, k_NGE, v_NGE, self, scale, window
        )
        return output

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
    return Packing(borders.to(device), max(lengths), buckets)


def _joins(length: int, longest: int, count: int) -> bool:
    if length > longest:
        return False
    # Small products cost their calls, not their padding.
    return length >= _LEAST_FILL * longest or (count + 1) * longest**2 <= _SMALL_BUCKET


def _places(lengths: Sequence[int], longest: int, device: str) -> Tensor | None:
    if all(length == longest for length in lengths):
        return None
    places = [torch.arange(length) + row * longest for row, length in enumerate(lengths)]
    return torch.cat(places).to(device)


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
    refused = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name)]
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
    left = -1 if window is None else window - 1
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
        enable_gqa=q_NHE.shape[1] != k_NGE.shape[1],
    )
    if not isinstance(output, Tensor):
        raise TypeError("varlen_attn gave more than its output")
    return output


class _Bucketed(torch.autograd.Function):
    """The CPU's way: bucket by bucket, plain products for short documents, SDPA for long ones.

    Measured on SmolLM2 (docs/benchmarks.md): the flash kernel's backward pass costs several times
    the plain products' for rows of a few hundred tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        packing: Packing,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out_NHE = torch.empty(q_NHE.shape, dtype=q_NHE.dtype, device=q_NHE.device)
        wants_grad = any(ctx.needs_input_grad[:3])
        steps = []
        for bucket in packing.buckets:
            dense = bucket.length <= _DENSE_LENGTH
            step: _Dense | _Long = (_Dense if dense else _Long)(bucket, packing, scale, window)
            out_NHE[bucket.begin : bucket.end] = step.forward(q_NHE, k_NGE, v_NGE, wants_grad)
            steps.append(step)
        ctx.steps = steps if wants_grad else []
        return out_NHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, ctx.steps = ctx.steps, None
        parts = [step.backward(grads[0]) for step in steps]
        if len(parts) == 1:
            return (*parts[0], None, None, None)
        return (*(torch.cat(part) for part in zip(*parts, strict=True)), None, None, None)


class _Padded:
    """Between a bucket's tokens [M, H, E] and its padded rows [n, H, T, E]."""

    def __init__(self, bucket: Bucket, packing: Packing, scale: float, window: int | None) -> None:
        self.bucket, self.packing, self.scale, self.window = bucket, packing, scale, window

    def rows(self, tokens_NHE: Tensor) -> Tensor:
        """[n, H, T, E], zeros where padded."""
        bucket = self.bucket
        part = tokens_NHE[bucket.begin : bucket.end]
        if bucket.places is not None:
            padded = part.new_zeros(bucket.count * bucket.length, *part.shape[1:])
            part = padded.index_copy_(0, bucket.places, part)
        return part.view(bucket.count, bucket.length, *part.shape[1:]).transpose(1, 2)

    def tokens(self, rows_nHTE: Tensor) -> Tensor:
        """The reverse."""
        flat = rows_nHTE.transpose(1, 2).flatten(0, 1)
        return flat if self.bucket.places is None else flat.index_select(0, self.bucket.places)


class _Dense(_Padded):
    """Softmax(QKᵀ)V with its probabilities kept, the heads of a group folded into the rows.

    Scores and softmax are in float32 at least; probabilities are kept in the inputs' type. Padded
    keys lie to the right of every real query, so causality hides them.
    """

    def forward(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, wants_grad: bool) -> Tensor:
        n, T, G = self.bucket.count, self.bucket.length, k_NGE.shape[1]
        H, E = q_NHE.shape[1:]
        wide = torch.promote_types(q_NHE.dtype, torch.float32)
        q = self.rows(q_NHE).reshape(n * G, H // G * T, E)
        k = self.rows(k_NGE).reshape(n * G, T, E)
        v = self.rows(v_NGE).reshape(n * G, T, E)
        bias_TT = self.packing.bias(T, self.window, q.new_empty(0, dtype=wide))
        scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2)).mul_(self.scale)
        scores.view(n * G, H // G, T, T).add_(bias_TT)
        probabilities = torch.softmax(scores, -1).to(q.dtype)
        out = torch.bmm(probabilities, v)
        if wants_grad:
            self.saved = q, k, v, probabilities
        return self.tokens(out.view(n, H, T, E))

    def backward(self, grad_NHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probabilities = self.saved
        del self.saved
        n, T = self.bucket.count, self.bucket.length
        grad = self.rows(grad_NHE).reshape(q.shape)
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
        slope = torch.bmm(grad, v.transpose(1, 2))
        # dS = P ∘ (dP − rowsum(dP ∘ P))
        slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
        slope *= self.scale
        grad_q = torch.bmm(slope, k)
        grad_k = torch.bmm(slope.transpose(1, 2), q)
        G = k.shape[0] // n
        return (
            self.tokens(grad_q.view(n, -1, T, q.shape[-1])),
            self.tokens(grad_k.view(n, G, T, -1)),
            self.tokens(grad_v.view(n, G, T, -1)),
        )


class _Long(_Padded):
    """`torch`'s SDPA, whose flash kernel holds no [T, T]."""

    def forward(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, wants_grad: bool) -> Tensor:
        with torch.set_grad_enabled(wants_grad):
            leaves = [
                self.rows(part).detach().requires_grad_(wants_grad)
                for part in (q_NHE, k_NGE, v_NGE)
            ]
            groups = leaves[0].shape[1] // leaves[1].shape[1]
            q, k, v = leaves[0], *(part.repeat_interleave(groups, 1) for part in leaves[1:])
            mask = None
            if self.window is not None:
                mask = self.packing.bias(self.bucket.length, self.window, q)
            rows = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
            )
        if wants_grad:
            self.saved = rows, leaves
        return self.tokens(rows.detach())

    def backward(self, grad_NHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, leaves = self.saved
        del self.saved
        q, k, v = torch.autograd.grad(rows, leaves, self.rows(grad_NHE))
        return self.tokens(q), self.tokens(k), self.tokens(v)
