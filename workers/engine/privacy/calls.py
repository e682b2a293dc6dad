"""One private forward_backward on its way through the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.batches import ScoredBatch
from workers.engine.privacy.clipping import clip_factors
from workers.engine.privacy.gradients import UnitGradients
from workers.operations import PrivacySettings


class PrivateCall:
    """Clips each unit of a call when its last row was computed, and adds it to the adapter's
    gradient.

    A unit usually lies in one pass; of one that does not, the sum so far is kept.

    Args:
        batch: whose `units` say what belongs together.
    """

    def __init__(self, settings: PrivacySettings, adapter: Adapter, batch: ScoredBatch) -> None:
        self._settings = settings
        self._adapter = adapter
        if batch.units is None:
            raise ValueError("the batch of a private call has units")
        self._units = batch.units
        self._scored = batch.ends > 0
        self.begin()

    def begin(self) -> None:
        """Forgets everything: the call's passes are computed from the first one on."""
        self._rows_left: Counter[int] = Counter(self._units[self._scored].tolist())
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        # On the device until they are asked for.
        self._counts = torch.zeros(2, dtype=torch.float64, device=self._adapter.weights.device)

    def gradients(self, rows: Sequence[int], lengths: Sequence[int]) -> UnitGradients:
        """For a pass.

        Args:
            rows: of the batch, in the order of the pass, those of a unit after one another.
            lengths: tokens of each.
        """
        counts = Counter(int(self._units[row]) for row in rows)
        self._rows_left.subtract(counts)
        return UnitGradients(self._adapter, list(counts), list(counts.values()), lengths)

    def close(self, found: UnitGradients, row_losses: Tensor) -> Tensor:
        """Takes what a backward pass has left.

        Args:
            row_losses: [R], in the order of the pass.

        Returns:
            float64 []: the losses, without those that are not finite.
        """
        parts = torch.split(row_losses.double(), found.counts)
        losses = torch.stack([part.sum() for part in parts])
        for index, unit in enumerate(found.units):
            if unit in self._open:
                gradient, loss = self._open.pop(unit)
                found.add_vector(index, gradient)
                losses[index] += loss
            if self._rows_left[unit]:
                self._open[unit] = found.vector(index), losses[index].clone()
                found.clear(index)
                losses[index] = 0.0
        settings = self._settings
        norms = found.norms()
        found.add_scaled(clip_factors(norms, settings.max_grad_norm))
        clipped = norms > settings.max_grad_norm
        bounded = losses.nan_to_num(nan=0.0).clamp(0.0, settings.max_loss)
        self._counts += torch.stack([clipped.sum().double(), bounded.sum()])
        return losses.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum()

    def counts(self) -> tuple[int, float]:
        """Units whose gradient was clipped, and the sum of all units' losses, each clipped too."""
        clipped, losses = self._counts.tolist()
        return round(clipped), losses
