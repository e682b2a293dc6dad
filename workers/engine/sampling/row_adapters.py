"""The adapters of rows in any order, one token each: all of them in two products a layer.

The rows' adapters are laid side by side: [R, K] of all A and [O, R] of all s·B, R the sum of their
ranks. Of x·Aᵀ [N, R] each row keeps its own adapter's part before the product with B; the rest is
0. For the few rows of a decoding step that is much faster than a product for each adapter.
"""

# ruff: noqa: N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.adapters import Pairs
from workers.engine.base_model import BaseModel
from workers.engine.lora import PassAdapters
from workers.engine.products import Part
from workers.engine.sampling.weights import PinnedWeights


@dataclass(frozen=True, slots=True)
class _Stack(Part):
    """Adapters side by side at one layer; `foreign` [N, R] is where a row is not to look."""

    foreign: Tensor | None


class _StackProduct:
    """See the module. It trains nothing."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        (stack,) = parts
        low_NR = inputs @ stack.a.t()
        if isinstance(stack, _Stack) and stack.foreign is not None:
            # Not multiplied by 0, which would keep another row's infinity.
            low_NR.masked_fill_(stack.foreign, 0)
        outputs += (low_NR @ stack.b.t()).to(outputs.dtype)
        return []

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        raise NotImplementedError("rows that are decoded train nothing")


class RowAdapters(PassAdapters):
    """What each row of a pass goes through; made anew when other adapters come in.

    Args:
        weights: those in use, each once; at least one has an adapter.
    """

    def __init__(self, model: BaseModel, weights: Sequence[PinnedWeights]) -> None:
        super().__init__([], model.faithful_adapter_dtype, _StackProduct())
        self._weights = [one for one in weights if one.adapter is not None]
        self._device = model.device
        tensors: list[tuple[Pairs, float]] = [
            (one.adapter.tensors(self.dtype), one.adapter.scale(training=False))
            for one in self._weights
            if one.adapter is not None
        ]
        self._stacks: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        modules = dict.fromkeys(module for pairs, _ in tensors for module in pairs)
        for module in modules:
            members = tuple(i for i, (pairs, _) in enumerate(tensors) if module in pairs)
            a_RK = torch.cat([tensors[i][0][module][0] for i in members])
            b_OR = torch.cat([tensors[i][0][module][1] * tensors[i][1] for i in members], 1)
            self._stacks[module] = (members, a_RK, b_OR)
        self._ranks = [one.adapter.settings.rank for one in self._weights if one.adapter]
        self._owners: list[int] = []
        self._foreign: dict[tuple[int, ...], Tensor | None] = {}

    @property
    def weights(self) -> list[PinnedWeights]:
        """Those with an adapter, in the order of their columns."""
        return self._weights

    def place(self, rows: Sequence[PinnedWeights | None]) -> None:
        """Says whose each row of the next passes is; None and base models go without."""
        numbers = {id(one): number for number, one in enumerate(self._weights)}
        owners = [numbers.get(id(one), -1) for one in rows]
        if owners != self._owners:
            self._owners = owners
            self._foreign = {}
            self._parts = {}

    def parts(self, module: str) -> list[Part]:
        if module not in self._parts:
            self._parts[module] = self._stack(module)
        return self._parts[module]

    def _stack(self, module: str) -> list[Part]:
        if module not in self._stacks:
            return []
        members, a_RK, b_OR = self._stacks[module]
        if members not in self._foreign:
            self._foreign[members] = self._mask(members)
        rows = len(self._owners)
        return [_Stack(0, rows, a_RK, b_OR, 1.0, None, None, self._foreign[members])]

    def _mask(self, members: tuple[int, ...]) -> Tensor | None:
        if len(members) == 1 and all(owner == members[0] for owner in self._owners):
            return None
        columns = torch.tensor([i for i in members for _ in range(self._ranks[i])])
        foreign_NR = torch.tensor(self._owners)[:, None] != columns
        return foreign_NR.to(self._device)
