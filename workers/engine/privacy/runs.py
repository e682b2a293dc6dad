"""What a private run holds beside what every run holds, and the release that ends its window."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.adapters import Adapter
from workers.engine.privacy.noise import NoiseThread, seeded_key, standard_normals
from workers.operations import PrivacySettings, PrivateRelease, RunSettings

_UNIT_RULES = (".lora_A.", ".lora_B.")
"""Kinds of tensors of which a backward pass gives each unit its own gradient."""


def check_private(settings: RunSettings, privacy: PrivacySettings, adapter: Adapter) -> None:
    """Refuses what cannot be trained privately.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION, INVALID_ARGUMENT.
    """
    for slot in adapter.slots:
        if not any(rule in slot.key for rule in _UNIT_RULES):
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"dp: {slot.key} is trained without a gradient for each unit; train LoRA's A and B "
                "alone",
                field="dp.enabled",
            )
    if settings.deterministic and privacy.test_seed is None:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            "deterministic: a private run's noise is fresh at each step, so that equal batches "
            "give unequal weights; leave deterministic unset",
            field="deterministic",
        )
    for name, value, positive in (
        ("noise_multiplier", privacy.noise_multiplier, False),
        ("max_grad_norm", privacy.max_grad_norm, True),
        ("expected_batch_size", privacy.expected_batch_size, True),
        ("loss_noise_multiplier", privacy.loss_noise_multiplier, True),
        ("max_loss", privacy.max_loss, True),
    ):
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"dp.{name} is {value}; it must be finite and "
                f"{'above 0' if positive else 'not negative'}",
                field=f"dp.{name}",
            )


class PrivateRun:
    """Counts of the open window, and the noise for its end.

    Args:
        thread: where noise is drawn ahead.
        count: P, of the adapter.
        dtype: of its numbers.
    """

    def __init__(
        self, settings: PrivacySettings, thread: NoiseThread, count: int, dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self._thread = thread
        # One more, for the loss.
        self._count, self._dtype = count + 1, dtype
        self._ahead: Future[Tensor] | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets the window's counts."""
        self.clipped = 0
        self.losses = 0.0

    def add(self, clipped: int, losses: float) -> None:
        """Counts a call: units that were clipped, and the sum of all units' clipped losses."""
        self.clipped += clipped
        self.losses += losses

    @property
    def held_bytes(self) -> int:
        """Memory of noise that was drawn ahead."""
        return 0 if self._ahead is None else self._count * self._dtype.itemsize

    def draw_ahead(self) -> None:
        """Begins to draw the next release's noise."""
        if self._ahead is None and self.settings.test_seed is None:
            self._ahead = self._thread.draw(self._count, self._dtype)

    def privatize(self, clipped_sum: Tensor, step: int) -> PrivateRelease:
        """The noised mean, (Σ clipped gradients + N(0, (σC)²)) / expected batch size, in place of
        the sum; ends the window.

        Args:
            clipped_sum: [P], overwritten.
            step: applied updates before this one.
        """
        own = self.settings
        noise = self._noise(step).to(clipped_sum.device)
        clipped_sum.add_(noise[:-1], alpha=own.noise_multiplier * own.max_grad_norm)
        clipped_sum /= own.expected_batch_size
        release = PrivateRelease(noise_applied=own.noise_multiplier > 0)
        if own.loss_noise_multiplier is not None:
            noised = self.losses + own.loss_noise_multiplier * own.max_loss * noise[-1].item()
            release.noised_loss = noised / own.expected_batch_size
        if own.tells_raw:
            release.num_clipped = self.clipped
        self.clear()
        return release

    def _noise(self, step: int) -> Tensor:
        if self.settings.test_seed is not None:
            return standard_normals(
                seeded_key(self.settings.test_seed, step), self._count, self._dtype
            )
        self.draw_ahead()
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            raise RuntimeError("no noise was drawn")
        return ahead.result()

    def as_json(self) -> dict[str, Any]:
        """The window's counts, for a snapshot."""
        return {"clipped": self.clipped, "losses": self.losses}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over the counts of a snapshot."""
        self.clipped = int(saved["clipped"])
        self.losses = float(saved["losses"])
