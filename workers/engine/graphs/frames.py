"""Adapters of several runs as rows of one matrix, where a graph reads them, and their gradients."""

# ruff: noqa: N806 - the suffixes give shapes
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from workers.engine.adapters import Adapter, Pairs, lay_out, pairs

_MOST_LAYOUTS = 16
_KEPT_BYTES = 4


class Frame:
    """Room for adapters of at most one rank on at most these modules; what one lacks is zero.

    Args:
        layers: the model's layers that can carry one, by full name.
        targets: last parts of the modules' names.
        rank: the largest.
        rows: how many adapters.
        dtype: what their products are computed in; gradients are added in float32.

    Attributes:
        weights: module → A [S, r, K] and s·B [S, O, r] of all rows.
        gradients: the same of their gradients; B's by s·B.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        targets: Sequence[str],
        rank: int,
        rows: int,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self._slots = lay_out(layers, targets, rank)
        size = self._slots[-1].end
        self._weights_SP = torch.zeros(rows, size, dtype=dtype, device=device)
        self._gradients_SP = torch.zeros(rows, size, dtype=torch.float32, device=device)
        self.weights: Pairs = pairs(self._slots, self._weights_SP)
        self.gradients: Pairs = pairs(self._slots, self._gradients_SP)
        # B's of each row: to take views anew for each pass would take longer than what is done.
        self._scaled_weights, self._scaled_gradients = (
            list(zip(*(b_SOr.unbind() for _, b_SOr in held.values()), strict=True))
            for held in (self.weights, self.gradients)
        )
        self._places: OrderedDict[tuple[int, tuple[str, ...]], Tensor | None] = OrderedDict()

    @staticmethod
    def bytes_of(
        layers: Mapping[str, nn.Linear],
        targets: Sequence[str],
        rank: int,
        rows: int,
        dtype: torch.dtype,
    ) -> int:
        """What one takes at first."""
        return rows * lay_out(layers, targets, rank)[-1].end * (dtype.itemsize + _KEPT_BYTES)

    @property
    def nbytes(self) -> int:
        """What it takes, with what it knows of its adapters' layouts."""
        places = sum(found.nbytes for found in self._places.values() if found is not None)
        return self._weights_SP.nbytes + self._gradients_SP.nbytes + places

    @torch.no_grad()
    def load(self, row: int, adapter: Adapter, scale: float) -> None:
        """Puts an adapter's weights into a row, B times its scale."""
        own_P, into_P = adapter.weights.detach(), self._weights_SP[row]
        places = self._places_of(adapter)
        if places is None:
            into_P.copy_(own_P)
        else:
            into_P.zero_().index_copy_(0, places, own_P.to(into_P.dtype))
        torch._foreach_mul_(self._scaled_weights[row], scale)

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Makes all zero."""
        self._gradients_SP.zero_()

    @torch.no_grad()
    def add_gradient(self, row: int, adapter: Adapter, scale: float) -> None:
        """Adds a row's gradient to its adapter's; the row's own is then of no more use."""
        torch._foreach_mul_(self._scaled_gradients[row], scale)
        found_P, places = self._gradients_SP[row], self._places_of(adapter)
        adapter.gradient().add_(found_P if places is None else found_P.index_select(0, places))

    def _places_of(self, adapter: Adapter) -> Tensor | None:
        """int64 [P], where each of an adapter's numbers lies in a row; None if it fills the row in
        its own order."""
        key = (adapter.settings.rank, tuple(sorted(set(adapter.settings.target_modules))))
        if key not in self._places:
            self._places[key] = self._find_places(adapter)
            # As many as one pass may have, or each pass would find them all again.
            if len(self._places) > max(_MOST_LAYOUTS, len(self._weights_SP)):
                self._places.popitem(last=False)
        self._places.move_to_end(key)
        return self._places[key]

    def _find_places(self, adapter: Adapter) -> Tensor | None:
        if adapter.slots == self._slots:
            return None
        here = {slot.key: slot for slot in self._slots}
        device = self._weights_SP.device
        found = []
        for slot in adapter.slots:
            room = here[slot.key]
            rows, columns = (torch.arange(size, device=device) for size in slot.shape)
            places = rows[:, None] * room.shape[1] + columns
            found.append(places.view(-1) + room.begin)
        return torch.cat(found)
