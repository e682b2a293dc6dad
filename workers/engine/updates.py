"""Updates of runs: windows close, their gradients are divided, clipped and applied."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.backend import NoisedFault
from workers.engine.magnitudes import l2_norms
from workers.engine.memory import memory_faults
from workers.engine.optimizers import Update, step
from workers.engine.run import Run
from workers.operations import Metric, PrivateRelease, StepOutcome, StepRequest
from workers.releases import check_charged, released_update
from workers.window import ClosedWindow


@dataclass(slots=True)
class _Closing:
    """A window on its way to an applied update."""

    index: int
    run: Run
    window: ClosedWindow
    gradient: Tensor
    rate: float
    decay: float
    clip: float | None
    release: PrivateRelease | None = None

    def metrics(self, norm: float, step_ms: float) -> list[Metric]:
        """Of the update."""
        metrics = self.window.metrics(norm, self.rate, step_ms)
        return released_update(self.run.settings.privacy, metrics)


def optim_step(entries: Sequence[tuple[Run, StepRequest]]) -> list[StepOutcome | Exception]:
    """Counts a call of each run; those that close their windows divide, clip and apply, as one
    where that is faster.

    Returns:
        Each entry's outcome, or why it failed: MAX_STEPS_REACHED, WINDOW_POISONED, EMPTY_WINDOW,
        NON_FINITE_GRADIENT, OUT_OF_MEMORY, INVALID_ARGUMENT.
    """
    begin = time.perf_counter()
    outcomes: dict[int, StepOutcome | Exception] = {}
    closing: list[_Closing] = []
    for index, (run, request) in enumerate(entries):
        try:
            ready = _close(index, run, request)
            if isinstance(ready, _Closing):
                closing.append(ready)
            else:
                outcomes[index] = ready
        except TenSafeFault as fault:
            outcomes[index] = fault
    done: list[tuple[_Closing, float]] = []
    for group in _stepping_together(closing):
        try:
            with memory_faults("optim_step"), torch.no_grad():
                norms, applied = _apply(group)
        except Exception as error:  # of this group alone: another may have stepped
            for each in group:
                outcomes[each.index] = _told(each, error)
            continue
        for each, norm, steps in zip(group, norms, applied, strict=True):
            if steps:
                done.append((each, norm))
            else:
                outcomes[each.index] = _told(each, _non_finite(norm))
    step_ms = (time.perf_counter() - begin) * 1e3 / max(1, len(closing))
    for each, norm in done:
        metrics = each.metrics(norm, step_ms)
        number = each.run.window.applied()
        outcomes[each.index] = StepOutcome(number, True, each.rate, norm, metrics, each.release)
    return [outcomes[index] for index in range(len(entries))]


def _stepping_together(closing: list[_Closing]) -> list[list[_Closing]]:
    """All as one on a GPU. A CPU's kernel takes one vector after the other anyway."""
    if closing and closing[0].gradient.device.type != "cpu":
        return [closing]
    return [[each] for each in closing]


def _told(each: _Closing, error: Exception) -> Exception:
    if each.run.private is None or not isinstance(error, TenSafeFault):
        return error
    return NoisedFault(error)


def _close(index: int, run: Run, request: StepRequest) -> StepOutcome | _Closing:
    own = run.settings.optimizer
    rate = own.learning_rate if request.learning_rate is None else request.learning_rate
    decay = own.weight_decay if request.weight_decay is None else request.weight_decay
    clip = own.grad_clip_norm if request.grad_clip_norm is None else request.grad_clip_norm
    _check_finite(rate, decay, clip)
    try:
        check_charged(run.settings.privacy, run.window, request)
        closed = run.window.call(closes=request.closes)
    except TenSafeFault:
        if not run.window.is_open:
            run.drop_window()
        raise
    if closed is None:
        return StepOutcome(run.window.step, False, rate)
    gradient, run.accumulator = run.accumulator, None
    if gradient is None:
        if run.private is None:
            raise RuntimeError("a window that holds a gradient has no accumulator")
        gradient = torch.zeros_like(run.adapter.weights, requires_grad=False)
    return _Closing(index, run, closed, gradient, rate, decay, clip)


def _apply(closing: Sequence[_Closing]) -> tuple[list[float], list[bool]]:
    """Norms before clipping, and which updates were applied."""
    for each in closing:
        if each.run.private is None:
            each.gradient /= each.window.divisor
        else:
            each.release = each.run.private.privatize(each.gradient, each.run.window.step)
    found = l2_norms([each.gradient for each in closing])
    applied = [False] * len(closing)
    members, updates = [], []
    for index, (each, norm) in enumerate(zip(closing, found, strict=True)):
        if not math.isfinite(norm):
            continue
        if each.clip is not None and norm > each.clip:
            each.gradient *= each.clip / norm
        largest = norm if each.clip is None else min(norm, each.clip)
        members.append(index)
        updates.append(Update(each.run.optimizer, each.gradient, largest, each.rate, each.decay))
    for index, done in zip(members, step(updates) if updates else [], strict=True):
        applied[index] = done
    return found, applied


def _non_finite(norm: float) -> TenSafeFault:
    if not math.isfinite(norm):
        return TenSafeFault(
            "NON_FINITE_GRADIENT",
            "the window's gradient is NaN or infinite; nothing was applied and the window is "
            "closed; lower the learning rate or the weights, or load an earlier state",
        )
    return TenSafeFault(
        "NON_FINITE_GRADIENT",
        "the update could make the weights or the optimizer's state NaN or infinite; nothing was "
        "applied and the window is closed; lower the learning rate, set grad_clip_norm, or make a "
        "run with a larger eps",
    )


def _check_finite(rate: float, decay: float, clip: float | None) -> None:
    for name, value, least in (
        ("learning_rate", rate, 0.0),
        ("weight_decay", decay, 0.0),
        ("grad_clip_norm", 1.0 if clip is None else clip, 1e-300),
    ):
        if not math.isfinite(value) or value < least:
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"{name} is {value}; it must be finite and not negative (grad_clip_norm above 0)",
                field=f"optim_step.{name}",
            )
