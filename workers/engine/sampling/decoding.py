"""Attention of each row's newest token to all that came before it in its row."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workers.engine.sampling.cache import Place, Pool

_LEAST_ROWS = 4


_LEAST_ROWS = 4


@dataclass(slots=True)
class _Part:
    """Rows that are attended to in one call: neighbours in the pass and in their pool.

    Attributes:
        begin, end: their tokens in the pass.
        slots: of the pool.
        lengths: of the rows, the newest token among them.
        own_slots, newest: int64 [n], each row's slot and the newest token's place in it.
    """

    pool: Pool[Any]
    begin: int
    end: int
    slots: slice
    lengths: list[int]
    own_slots: Tensor
    newest: Tensor
    _biases: dict[int | None, Tensor | None] = field(default_factory=dict)

    def first(self, window: int | None) -> int:
        """The first token that any of the rows sees."""
        return 0 if window is None else max(0, min(self.lengths) - window)

    def bias(self, window: int | None, like: Tensor) -> Tensor | None:
        """[n, 1, 1, T] of 0 where a row sees a token, −∞ elsewhere; None if all see all."""
        if window not in self._biases:
            self._biases[window] = self._bias(window, like)
        return self._biases[window]

    def _bias(self, window: int | None, like: Tensor) -> Tensor | None:
        first, last = self.first(window), max(self.lengths)
        if all(length == last for length in self.lengths):
            return None  # and with a window it begins at the same token for all
        ends = torch.tensor(self.lengths, device=like.device)[:, None]
        tokens = torch.arange(first, last, device=like.device)
        seen = tokens < ends
        if window is not None:
            seen &= tokens >= ends - window
        wide = torch.promote_types(like.dtype, torch.float32)
        bias = torch.zeros(seen.shape, dtype=wide, device=like.device)
        return bias.masked_fill_(~seen, -torch.inf)[:, None, None]


class Decoding:
    """One pass over the newest tokens of rows, one token each.

    Args:
        places: the rows', in the order of the pass; those of a pool by slot. None for a token that
            belongs to no row and sees only itself.
        alone: attend to each row by itself, so that no number depends on another row.
    """

    def __init__(
        self, places: Sequence[Place[Any] | None], device: str, *, alone: bool = False
    ) -> None:
        self._parts: list[_Part] = []
        self._stray = [index for index, place in enumerate(places) if place is None]
        begin = 0
        while begin < len(places):
            first = places[begin]
            end = begin + 1
            if first is None:
                begin = end
                continue
            while not alone and end < len(places) and _follows(places[end], first, end - begin):
                end += 1
            rows = [place for place in places[begin:end] if place is not None]
            self._parts.append(
                _Part(
                    first.pool,
                    begin,
                    end,
                    slice(first.slot, first.slot + len(rows)),
                    [place.length + 1 for place in rows],
                    torch.tensor([place.slot for place in rows], device=device),
                    torch.tensor([place.length for place in rows], device=device),
                )
            )
            begin = end

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[N, H, E]; the tokens' keys and values are added to their rows."""
        H, G = q_NHE.shape[1], k_NGE.shape[1]
        found: list[Tensor] = []
        for part in self._parts:
            keys, values = part.pool.keys[module.layer_idx], part.pool.values[module.layer_idx]
            tokens = slice(part.begin, part.end)
            keys[part.own_slots, :, :, part.newest] = k_NGE[tokens]
            values[part.own_slots, :, part.newest] = v_NGE[tokens]
            seen = slice(part.first(window), max(part.lengths))
            # The heads of a group ask for the same keys: they are the queries of one head.
            q_nGhE = q_NHE[tokens].reshape(part.end - part.begin, G, H // G, -1)
            attend = _fused if q_NHE.is_cuda else _plain
            out_nGhE = attend(
                q_nGhE,
                keys[part.slots, :, :, seen],
                values[part.slots, :, seen],
                part.bias(window, q_NHE),
                scale,
            )
            found.append(out_nGhE.reshape(part.end - part.begin, H, -1))
        if not self._stray:
            return found[0] if len(found) == 1 else torch.cat(found)
        out_NHE = v_NGE.repeat_interleave(H // G, 1)
        for part, own in zip(self._parts, found, strict=True):
            out_NHE[part.begin : part.end] = own
        return out_NHE


def _fused(
    q_nGhE: Tensor, k_nGET: Tensor, v_nGTE: Tensor, bias_n11T: Tensor | None, scale: float
) -> Tensor:
    bias = None
    if bias_n11T is not None:
        bias = bias_n11T.to(q_nGhE.dtype).expand(-1, 1, q_nGhE.shape[2], -1)
    k_nGTE = k_nGET.transpose(2, 3)
    return scaled_dot_product_attention(q_nGhE, k_nGTE, v_nGTE, attn_mask=bias, scale=scale)


def _plain(
    q_nGhE: Tensor, k_nGET: Tensor, v_nGTE: Tensor, bias_n11T: Tensor | None, scale: float
) -> Tensor:
    """The products that `attention` has for training on a CPU, in the same types and the same
    order of sums as far as the library allows, so that rounding goes the same way; and as fast as
    a fused kernel for one token a row."""
    n, G, h, E = q_nGhE.shape
    wide = torch.promote_types(q_nGhE.dtype, torch.float32)
    # For fewer rows libraries have other kernels.
    rows = torch.zeros(n * G, max(h, _LEAST_ROWS), E, dtype=wide)
    rows[:, :h] = q_nGhE.reshape(n * G, h, E)
    scores = torch.bmm(rows, k_nGET.flatten(0, 1).to(wide))[:, :h].mul_(scale)
    if bias_n11T is not None:
        scores.view(n, G, h, -1).add_(bias_n11T)
    shares = torch.softmax(scores, -1).to(q_nGhE.dtype)
    return torch.bmm(shares, v_nGTE.flatten(0, 1)).view(n, G, h, -1)


def _follows(place: Place[Any] | None, first: Place[Any], slots: int) -> bool:
    return place is not None and place.pool is first.pool and place.slot == first.slot + slots
