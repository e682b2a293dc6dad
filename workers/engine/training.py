"""Training of runs: forward passes, gradients, updates; several runs together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.backend import NoisedFault
from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.batches import check_batch
from workers.engine.budget import TokenBudget
from workers.engine.execution import execute
from workers.engine.gathering import Computed
from workers.engine.memory import memory_faults
from workers.engine.objectives import Objective
from workers.engine.optimizers import RunOptimizer, Update, step
from workers.engine.passes import Call
from workers.engine.privacy.batches import private_batch
from workers.engine.privacy.calls import PrivateCall
from workers.engine.privacy.runs import PrivateRun
from workers.operations import (
    Combine,
    LossOutcome,
    LossRequest,
    Metric,
    PrivateRelease,
    RunSettings,
    StepOutcome,
    StepRequest,
)
from workers.releases import (
    check_charged,
    check_forward,
    private_request,
    released_call,
    released_update,
)
from workers.window import ClosedWindow, Window, divisor, scored_loss

_NOT_RUN = TenSafeFault("INTERNAL", "not executed")


@dataclass
class Run:
    """A run's whole state.

    Attributes:
        accumulator: float32 [P], the summed gradient of the open window; None while it is closed.
        seed: fixes dropout and sampling; the configuration's, or that of a loaded state.
        backwards: forward_backward calls that took effect, over the run's whole life. It counts
            the "logical operation" of the dropout masks, and travels with the state, so that a
            restored run goes on with the masks that it would have had.
        private: of a private run; None else.
        unit_tokens: what the gradient of one unit takes of a pass's tokens.
    """

    run_id: str
    settings: RunSettings
    model: BaseModel
    adapter: Adapter
    optimizer: RunOptimizer
    window: Window
    seed: int
    accumulator: Tensor | None = None
    backwards: int = 0
    private: PrivateRun | None = None
    unit_tokens: int = 0

    def drop_window(self) -> None:
        """Forgets the open window, poisoned or not, and what it holds."""
        self.window.clear()
        self.accumulator = None
        if self.private is not None:
            self.private.clear()


Resolve = Callable[[Run, LossRequest], Objective]
"""Reads what a request says of its loss; may raise TenSafeFault."""


def forward(run: Run, request: LossRequest, budget: TokenBudget, resolve: Resolve) -> LossOutcome:
    """Loss and outputs; changes nothing. Dropout acts only if the request asks for the masks of
    the next forward_backward."""
    check_forward(run.settings.privacy)
    call = _call(run, request, resolve)
    (computed,) = _execute([call], run, budget, trains=False, drops=request.dropout)
    if isinstance(computed, TenSafeFault):
        raise computed
    _check_loss(computed.loss_sum)
    return _outcome(call, computed)


def forward_backward(
    entries: Sequence[tuple[Run, LossRequest]], budget: TokenBudget, resolve: Resolve
) -> list[LossOutcome | TenSafeFault]:
    """Adds each batch's summed gradient to its run's window, all in the same passes.

    Args:
        entries: runs on one base model, each at most once; a deterministic one comes alone.

    Returns:
        Each entry's outcome, or why it failed; that entry's window is poisoned, and no other is
        touched.

    Raises:
        ValueError: a deterministic run has company; no window is touched.
    """
    if len(entries) > 1:
        for run, _ in entries:
            if run.settings.deterministic:
                raise ValueError(f"run {run.run_id} is deterministic and must be computed alone")
    begin = time.perf_counter()
    outcomes: list[LossOutcome | TenSafeFault] = []
    admitted: list[tuple[int, Call]] = []
    for index, (run, request) in enumerate(entries):
        try:
            call = _call(run, request, resolve)
            run.window.admit(call.objective.reduction)
            admitted.append((index, _training(run, call)))
            outcomes.append(_NOT_RUN)
        except TenSafeFault as fault:
            run.window.poison()
            outcomes.append(fault)
    if not admitted:
        return outcomes
    runs = [entries[index][0] for index, _ in admitted]
    found: Sequence[Computed | TenSafeFault]
    try:
        found = _execute([call for _, call in admitted], runs[0], budget, trains=True)
    except TenSafeFault as fault:
        found = [fault] * len(runs)
    except BaseException:
        for run in runs:
            run.window.poison()
            run.adapter.release_gradient()
        raise
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    tokens = sum(len(call.batch.tokens) for _, call in admitted)
    for (index, call), computed in zip(admitted, found, strict=True):
        run, _ = entries[index]
        share_ms = elapsed_ms * len(call.batch.tokens) / tokens
        try:
            outcomes[index] = _accumulate(run, call, computed, share_ms)
        except TenSafeFault as fault:
            run.window.poison()
            outcomes[index] = fault
    return outcomes


def _execute(
    calls: Sequence[Call], first: Run, budget: TokenBudget, *, trains: bool, drops: bool = True
) -> Sequence[Computed | TenSafeFault]:
    """What came of each; of a batch in which nothing is scored, nothing."""
    found: list[Computed | TenSafeFault] = [Computed(0.0, 0.0, [], {}) for _ in calls]
    scored = [index for index, call in enumerate(calls) if call.batch.scored]
    if scored:
        computed = execute(
            first.model,
            [calls[index] for index in scored],
            budget,
            trains=trains,
            drops=drops,
            deterministic=first.settings.deterministic,
        )
        for index, own in zip(scored, computed, strict=True):
            found[index] = own
    return found


def _accumulate(
    run: Run, call: Call, computed: Computed | TenSafeFault, compute_ms: float
) -> LossOutcome:
    # This call's own gradient, apart from what the window holds: its norm is asked for, and a
    # failure half-way leaves the window's sum as it was.
    gradient = run.adapter.release_gradient()
    if isinstance(computed, TenSafeFault):
        raise computed
    _check_loss(computed.loss_sum)
    if run.accumulator is None:
        run.accumulator = gradient
    else:
        run.accumulator += gradient
    if call.private is None or run.private is None:
        run.backwards += 1
    else:
        run.private.add(*call.private.counts())
    run.window.add(
        call.objective.reduction,
        loss_sum=computed.loss_sum,
        denominator=call.batch.denominator,
        tokens=len(call.batch.tokens),
        compute_ms=compute_ms,
        defined=computed.metrics,
    )
    outcome = _outcome(call, computed)
    if call.private is None:
        norm = computed.grad_norm / divisor(call.objective.reduction, call.batch.denominator)
        outcome.metrics.append(Metric("grad_norm", norm, Combine.LAST))
    return released_call(run.settings.privacy, outcome)


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
    outcomes: list[StepOutcome | Exception] = []
    closing: list[_Closing] = []
    for index, (run, request) in enumerate(entries):
        try:
            ready = _close(index, run, request)
            if isinstance(ready, _Closing):
                closing.append(ready)
                outcomes.append(_NOT_RUN)
            else:
                outcomes.append(ready)
        except TenSafeFault as fault:
            outcomes.append(fault)
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
        step = each.run.window.applied()
        outcomes[each.index] = StepOutcome(step, True, each.rate, norm, metrics, each.release)
    return outcomes


def _stepping_together(closing: list[_Closing]) -> list[list[_Closing]]:
    """All as one on a GPU. A CPU's kernel takes one vector after the other anyway, and what one
    run's update may have to take back fits into memory that is used again (`undo.copies`)."""
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
    norms = torch.stack(torch._foreach_norm([each.gradient for each in closing])).tolist()
    applied = [False] * len(closing)
    members, updates = [], []
    for index, (each, norm) in enumerate(zip(closing, norms, strict=True)):
        if not math.isfinite(norm):
            continue
        if each.clip is not None and norm > each.clip:
            each.gradient *= each.clip / norm
        members.append(index)
        updates.append(Update(each.run.optimizer, each.gradient, each.rate, each.decay))
    for index, done in zip(members, step(updates) if updates else [], strict=True):
        applied[index] = done
    return norms, applied


def _non_finite(norm: float) -> TenSafeFault:
    if not math.isfinite(norm):
        return TenSafeFault(
            "NON_FINITE_GRADIENT",
            "the window's gradient is NaN or infinite; nothing was applied and the window is "
            "closed; lower the learning rate or the weights, or load an earlier state",
        )
    return TenSafeFault(
        "NON_FINITE_GRADIENT",
        "the update made the weights or the optimizer's state NaN or infinite; nothing was "
        "applied and the window is closed; lower the learning rate, or raise eps",
    )


def _outcome(call: Call, computed: Computed) -> LossOutcome:
    batch = call.batch
    metrics = [
        *scored_loss(call.objective.reduction, computed.loss_sum, batch.denominator),
        Metric("tokens", len(batch.tokens), Combine.SUM),
        Metric("scored_tokens", batch.scored, Combine.SUM),
        *computed.metrics,
    ]
    return LossOutcome(metrics, computed.outputs)


def _call(run: Run, request: LossRequest, resolve: Resolve) -> Call:
    """A request, checked.

    Raises:
        TenSafeFault: what is wrong with it.
    """
    model = run.model
    if run.private is not None:
        request = private_request(request)
    elif request.batch.units is not None:
        raise TenSafeFault(
            "INVALID_BATCH",
            "batch.units: only private runs have privacy units; remove them",
            field="batch.units",
        )
    objective = resolve(run, request)
    batch = check_batch(
        request,
        objective.loss,
        objective.reduction,
        model.vocabulary_size,
        model.context_length,
    )
    if run.private is None:
        return Call(run.adapter, batch, objective, run.seed, run.backwards)
    # Masks by the step: how many calls came before may depend on who was in their batches.
    units = request.batch.units
    batch = private_batch(batch, objective.reduction, units, run.unit_tokens)
    return Call(run.adapter, batch, objective, run.seed, run.window.step)


def _training(run: Run, call: Call) -> Call:
    """The same, with what a backward pass needs."""
    if run.private is None:
        return call
    run.private.draw_ahead()
    return replace(call, private=PrivateCall(run.private.settings, run.adapter, call.batch))


def _check_loss(loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise TenSafeFault(
            "NON_FINITE_LOSS",
            "the loss is NaN or infinite and the call added no gradient; lower the learning rate "
            "or the weights, or load an earlier state",
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
