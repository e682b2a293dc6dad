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


@dataclass(slots=True)
class _Part:
    """Rows that are attended to in one call: neighbours in the pass and in their pool.

    Attributes:
        begin, end: their tokens in the pass.
        slots: of the pool.
        lengths: of the rows, the newest token among them.
        places: int64 [n], where their newest tokens lie in the pool's [S·C].
    """

    pool: Pool[Any]
    begin: int
    end: int
    slots: slice
    lengths: list[int]
    places: Tensor
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
        bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
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
            capacity = first.pool.capacity
            written = [place.slot * capacity + place.length for place in rows]
            self._parts.append(
                _Part(
                    first.pool,
                    begin,
                    end,
                    slice(first.slot, first.slot + len(rows)),
                    [place.length + 1 for place in rows],
                    torch.tensor(written, device=device),
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
            keys.view(-1, *keys.shape[2:]).index_copy_(0, part.places, k_NGE[tokens])
            values.view(-1, *values.shape[2:]).index_copy_(0, part.places, v_NGE[tokens])
            seen = slice(part.first(window), max(part.lengths))
            # The heads of a group ask for the same keys: they are the queries of one head.
            q_nGhE = q_NHE[tokens].reshape(part.end - part.begin, G, H // G, -1)
            bias = part.bias(window, q_NHE)
            out_nGhE = scaled_dot_product_attention(
                q_nGhE,
                keys[part.slots, seen].transpose(1, 2),
                values[part.slots, seen].transpose(1, 2),
                attn_mask=None if bias is None else bias.expand(-1, 1, H // G, -1),
                scale=scale,
            )
            found.append(out_nGhE.reshape(part.end - part.begin, H, -1))
        if not self._stray:
            return found[0] if len(found) == 1 else torch.cat(found)
        out_NHE = v_NGE.repeat_interleave(H // G, 1)
        for part, own in zip(self._parts, found, strict=True):
            out_NHE[part.begin : part.end] = own
        return out_NHE


def _follows(place: Place[Any] | None, first: Place[Any], slots: int) -> bool:
    return place is not None and place.pool is first.pool and place.slot == first.slot + slots
