"""A pytest plugin that breaks the engine's privacy in the way that TENSAFE_MUTATION names."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from workers.engine import training, updates
from workers.engine.privacy import calls, runs


def remove_clipping() -> None:
    calls.clip_factors = lambda norms, bound: torch.ones_like(norms)


def clip_each_tensor() -> None:
    """Not all of a unit's tensors jointly: the sum may be √(tensors) times too long."""

    def close(call: Any, found: Any, row_losses: Any) -> Any:
        whole = found._found
        for module, pair in list(whole.items()):
            found._found = {module: pair}
            found.add_scaled(calls.clip_factors(found.norms(), call._settings.max_grad_norm))
        found._found = whole
        return row_losses.double().sum()

    calls.PrivateCall.close = close


def noise_each_microbatch() -> None:
    close = calls.PrivateCall.close

    def noised(call: Any, found: Any, row_losses: Any) -> Any:
        loss = close(call, found, row_losses)
        own, gradient = call._settings, call._adapter.gradient()
        gradient += own.noise_multiplier * own.max_grad_norm * torch.randn_like(gradient)
        return loss

    calls.PrivateCall.close = noised


def divide_by_actual_count() -> None:
    private_batch, privatize = training.private_batch, runs.PrivateRun.privatize
    counts: list[int] = []

    def counted(batch: Any, *args: Any) -> Any:
        found = private_batch(batch, *args)
        counts.append(len(np.unique(found.units[found.ends > 0])))
        return found

    def divided(run: Any, total: Any, step: int) -> Any:
        run.settings = replace(run.settings, expected_batch_size=float(max(1, sum(counts))))
        counts.clear()
        return privatize(run, total, step)

    training.private_batch, runs.PrivateRun.privatize = counted, divided


def mean_loss_of_the_batch() -> None:
    private_batch = training.private_batch

    def mixed(batch: Any, *args: Any) -> Any:
        found = private_batch(batch, *args)
        rows = len(found.ends)
        return replace(found, shares=np.full(rows, rows / max(1, found.scored)))

    training.private_batch = mixed


def skip_the_charge() -> None:
    updates.check_charged = lambda privacy, window, request: None


def halve_the_noise() -> None:
    noise = runs.PrivateRun._noise
    runs.PrivateRun._noise = lambda run, step: noise(run, step) / 2


def number_masks_by_place() -> None:
    """A row's dropout masks depend on how many rows come before it."""
    private_batch = training.private_batch

    def placed(batch: Any, *args: Any) -> Any:
        return replace(private_batch(batch, *args), row_keys=np.arange(len(batch.ends)))

    training.private_batch = placed


def number_masks_by_calls() -> None:
    """A row's dropout masks depend on how many calls come before it."""
    call = training._call

    def counted(run: Any, *args: Any) -> Any:
        return replace(call(run, *args), operation=run.window.backwards)

    training._call = counted


def tell_of_broken_units() -> None:
    """A gradient that is not finite reaches the sum."""
    clip = calls.clip_factors
    calls.clip_factors = lambda norms, bound: torch.where(
        torch.isfinite(norms), clip(norms, bound), torch.nan
    )


def pytest_configure() -> None:
    name = os.environ.get("TENSAFE_MUTATION")
    if name:
        globals()[name]()
