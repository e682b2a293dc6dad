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
    """A window on its way to an applied update.

    Attributes:
        norm: the gradient's, before it is clipped.
    """

    index: int
    run: Run
    window: ClosedWindow
    gradient: Tensor
    rate: float
    decay: float
    clip: float | None
    norm: float = math.nan
    release: PrivateRelease | None = None

    def update(self) -> Update:
        """What the optimizer is to do."""
        norm = self.norm if self.clip is None else min(self.norm, self.clip)
        return Update(self.run.optimizer, self.gradient, norm, self.rate, self.decay)

    def metrics(self, step_ms: float) -> list[Metric]:
        """Of the update."""
        metrics = self.window.metrics(self.norm, self.rate, step_ms)
        return released_update(self.run.settings.privacy, metrics)


def optim_step(entries: Sequence[tuple[Run, StepRequest]]) -> list[StepOutcome | Exception]:
    """Counts a call of each run; those that close their windows divide, clip and apply, as one.

    Returns:
        Each entry's outcome, or why it failed: MAX_STEPS_REACHED, WINDOW_POISONED, EMPTY_WINDOW,
        NON_FINITE_GRADIENT, OUT_OF_MEMORY, INVALID_ARGUMENT.
    """
    begin = time.perf_counter()
    outcomes: dict[int, StepOutcome | Exception] = {}
    closing: list[_Closing] = []
    for index, (run, request) in enumerate(entries):
        try:
            closed = _close(index, run, request)
            if isinstance(closed, _Closing):
                closing.append(closed)
            else:
                outcomes[index] = closed
        except TenSafeFault as fault:
            outcomes[index] = fault
    ready = _prepared(closing, outcomes)
    stepped = _stepped(ready)
    step_ms = (time.perf_counter() - begin) * 1e3 / max(1, len(closing))
    for each, found in zip(ready, stepped, strict=True):
        if isinstance(found, Exception):
            outcomes[each.index] = _told(each, found)
            continue
        metrics = each.metrics(step_ms)
        number = each.run.window.applied()
        outcomes[each.index] = StepOutcome(
            number, True, each.rate, each.norm, metrics, each.release
        )
    return [outcomes[index] for index in range(len(entries))]


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
        try:
            with memory_faults("optim_step"):
                gradient = torch.zeros_like(run.adapter.weights, requires_grad=False)
        except TenSafeFault as fault:
            raise NoisedFault(fault) from None  # that it failed tells that nothing was added
    return _Closing(index, run, closed, gradient, rate, decay, clip)


@torch.no_grad()
def _prepared(
    closing: Sequence[_Closing], outcomes: dict[int, StepOutcome | Exception]
) -> list[_Closing]:
    """Those whose gradients are divided or noised, and clipped; of the others, why not."""
    found: list[_Closing] = []
    for each in closing:
        try:
            with memory_faults("optim_step"):
                if each.run.private is None:
                    each.gradient /= each.window.divisor
                else:
                    step = each.run.window.step
                    each.release = each.run.private.privatize(each.gradient, step)
            found.append(each)
        except Exception as error:
            outcomes[each.index] = _told(each, error)
    try:
        with memory_faults("optim_step"):
            norms = l2_norms([each.gradient for each in found]) if found else []
            for each, norm in zip(found, norms, strict=True):
                each.norm = norm
                if each.clip is not None and each.clip < norm < math.inf:
                    each.gradient *= each.clip / norm
    except Exception as error:
        outcomes.update({each.index: _told(each, error) for each in found})
        return []
    return found


def _stepped(ready: Sequence[_Closing]) -> list[Exception | None]:
    """Why an update was not applied, if it was not."""
    found: list[Exception | None] = [_non_finite(each.norm) for each in ready]
    finite = [index for index, each in enumerate(ready) if math.isfinite(each.norm)]
    try:
        with memory_faults("optim_step"):
            outcomes = step([ready[index].update() for index in finite])
    except Exception as error:
        outcomes = [error] * len(finite)
    for index, outcome in zip(finite, outcomes, strict=True):
        if isinstance(outcome, Exception):
            found[index] = outcome
        elif outcome:
            found[index] = None
    return found


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
