"""Losses and gradients of runs, several together; `updates` applies them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tensafe.wire.status import TenSafeFault
from workers.engine.batches import check_batch
from workers.engine.budget import TokenBudget
from workers.engine.execution import execute
from workers.engine.gathering import Computed
from workers.engine.memory import memory_faults
from workers.engine.objectives import Objective
from workers.engine.passes import Call
from workers.engine.privacy.batches import private_batch
from workers.engine.privacy.calls import PrivateCall
from workers.engine.run import Run
from workers.operations import (
    Combine,
    LossOutcome,
    LossRequest,
    Metric,
)
from workers.releases import (
    check_forward,
    private_request,
    released_call,
)
from workers.window import divisor, scored_loss

_NOT_RUN = TenSafeFault("INTERNAL", "not executed")


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
    tokens = max(1, sum(len(call.batch.tokens) for _, call in admitted))
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
    if gradient is None:  # nothing was scored
        with memory_faults("gradient"):
            gradient = torch.zeros_like(run.adapter.weights, requires_grad=False)
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
    is_empty = request.batch.is_empty
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
    if is_empty:
        batch = replace(batch, tokens=batch.tokens[:0])  # of what stands in its place none counts
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
