"""The gradient of each unit of a private call, as one backward pass leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.magnitudes import squared_norms
from workers.engine.privacy.row_products import row_products
from workers.engine.products import Part


class UnitGradients:
    """Gradients of U units, kept apart.

    They are made where they are computed, layer by layer, in memory that the backward pass has just
    freed.

    Args:
        adapter: whose A and B they are of.
        units: their numbers, in the order of the pass.
        counts: rows of each in the pass.
        lengths: tokens of each row; the call's tokens are theirs, end to end.
    """

    def __init__(
        self,
        adapter: Adapter,
        units: Sequence[int],
        counts: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.units = list(units)
        self.counts = list(counts)
        self._adapter = adapter
        # A row has a product of its own, and a unit's are added up in the weights' type: which of
        # its rows are in one pass depends on other units, and is to round nothing otherwise.
        owners = [index for index, count in enumerate(counts) for _ in range(count)]
        self._owners = torch.tensor(owners, device=adapter.weights.device)
        self._lengths = list(lengths)
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def part(self, module: str, whole: Part) -> UnitPart:
        """A segment whose gradients come here."""
        own = (whole.begin, whole.end, whole.a, whole.b, whole.scale, None, None)
        return UnitPart(*own, module, self)

    def add(
        self, module: str, grad_a: tuple[Tensor, Tensor], grad_b: tuple[Tensor, Tensor]
    ) -> None:
        """Adds each unit's own products.

        Args:
            grad_a: [r, n] and [n, K], whose product is a unit's gradient of A over its n tokens.
            grad_b: [O, n] and [n, r].
        """
        a_UrK, b_UOr = self._products(*grad_a), self._products(*grad_b)  # noqa: N806
        if module in self._found:
            before = self._found[module]
            a_UrK, b_UOr = before[0].add_(a_UrK), before[1].add_(b_UOr)  # noqa: N806
        self._found[module] = a_UrK, b_UOr

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        dtype = self._adapter.weights.dtype
        found = row_products(left, right, self._lengths)
        if len(self.units) == len(found):
            return found.to(dtype)
        sums = torch.zeros(len(self.units), *found.shape[1:], dtype=dtype, device=found.device)
        return sums.index_add_(0, self._owners, found.to(dtype))

    def norms(self) -> Tensor:
        """float64 [U]: L2 norm of each unit's gradient over the whole adapter; NaN or infinite if
        one of its numbers is."""
        count, device = len(self.units), self._adapter.weights.device
        squares = torch.zeros(count, dtype=torch.float64, device=device)
        for pair in self._found.values():
            for part in pair:
                squares += squared_norms(part.view(count, -1))
        return squares.sqrt_()

    def add_scaled(self, factors_U: Tensor) -> None:  # noqa: N803
        """Adds Σ factor·gradient to the adapter's gradient, from the numbers that the norms were
        computed from. A unit whose factor is 0 is overwritten, since 0 times NaN is not 0."""
        dropped, factors = (
            (factors_U == 0).nonzero()[:, 0],
            factors_U.to(self._adapter.weights.dtype),
        )
        totals = self._adapter.gradients()
        for module, pair in self._found.items():
            for part, total in zip(pair, totals[module], strict=True):
                part.index_fill_(0, dropped, 0.0)
                total.view(-1).addmv_(part.view(len(factors), -1).t(), factors)

    def vector(self, index: int) -> Tensor:
        """[P], laid out like the adapter: a copy of one unit's gradient."""
        vector = torch.zeros_like(self._adapter.weights, requires_grad=False)
        own = self._adapter.pairs(vector)
        for module, pair in self._found.items():
            for part, place in zip(pair, own[module], strict=True):
                place.copy_(part[index])
        return vector

    def add_vector(self, index: int, vector: Tensor) -> None:
        """Adds to one unit's gradient."""
        own = self._adapter.pairs(vector)
        for module, pair in self._found.items():
            for part, more in zip(pair, own[module], strict=True):
                part[index] += more

    def clear(self, index: int) -> None:
        """Makes one unit's gradient 0."""
        for pair in self._found.values():
            for part in pair:
                part[index] = 0.0


@dataclass(frozen=True, slots=True)
class UnitPart(Part):
    """A segment of several units on one adapter.

    Forward, and for its inputs' gradient, it is one segment; of A and B each unit has its own
    gradient, which goes to `units`.
    """

    module: str
    units: UnitGradients

    def add_gradients(
        self, grad_low_t: Tensor, inputs: Tensor, slope_t: Tensor, low: Tensor
    ) -> None:
        """As `Part`, unit by unit."""
        scale = self.scale
        self.units.add(self.module, (grad_low_t * scale, inputs), (slope_t, low * scale))
