"""Executes the forward or forward-and-backward work of one or several calls together.

Calls are isolated: one whose numbers are not finite is answered by itself, and the others get the
bits that they would have had without it.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.budget import TokenBudget
from workers.engine.gathering import Computed, gather
from workers.engine.magnitudes import certain, l2_norm
from workers.engine.memory import give_back, is_memory_error, memory_faults
from workers.engine.passes import Call, Pass, cut
from workers.engine.scoring import LossFunctionError, PortionLoss
from workers.engine.strands import compute_in_strands

log = logging.getLogger(__name__)


def execute(
    model: BaseModel,
    calls: Sequence[Call],
    budget: TokenBudget,
    *,
    trains: bool,
    drops: bool | None = None,
    deterministic: bool = False,
) -> list[Computed | TenSafeFault]:
    """Computes the calls in as few passes as the budget allows.

    A deterministic call must come alone. No two calls may have the same adapter if they train.

    Args:
        drops: whether dropout acts; None if they train.

    Returns:
        What came of each, or OUT_OF_MEMORY for one with rows that do not fit by themselves, not
        even with their activations made anew, or INTERNAL for one whose loss function failed.

    Raises:
        TenSafeFault: OUT_OF_MEMORY, when there is not even room for the gradients.
    """
    mode = _Mode(trains, trains if drops is None else drops, deterministic)
    before = budget.trial()
    found = _fitting(model, calls, budget, mode)
    learnt = budget.trial()  # by now
    if isinstance(found, _Failed):
        outcomes: list[Computed | TenSafeFault] = [found.fault] * len(calls)
        rest = [index for index in range(len(calls)) if index != found.call]
        apart = [rest]
    else:
        outcomes = [*found]
        broken = _broken(found) if len(calls) > 1 else []
        # A product may have carried one call's NaN into a neighbour's sum; each is owed its own
        # bits, and so the budget that it would have had.
        if broken:
            budget.adopt(before)
        rest = [index for index in range(len(calls)) if index not in broken]
        apart = [rest, *([index] for index in broken)] if broken else []
    for members in apart:
        if members:
            own = [calls[index] for index in members]
            again = execute(
                model, own, budget, trains=trains, drops=drops, deterministic=deterministic
            )
            for index, outcome in zip(members, again, strict=True):
                outcomes[index] = outcome
    if learnt.together < min(before.together, budget.together):
        budget.adopt(learnt)  # or each call to come would find out anew what does not fit
    return outcomes


def _broken(found: Sequence[Computed]) -> list[int]:
    """Calls whose loss is not finite or, if all losses are, whose gradient is not."""
    for numbers in (
        [computed.loss_sum for computed in found],
        [computed.grad_norm for computed in found],
    ):
        broken = [index for index, number in enumerate(numbers) if not math.isfinite(number)]
        if broken:
            return broken
    return []


@dataclass(frozen=True, slots=True)
class _Mode:
    """How calls are computed."""

    trains: bool
    drops: bool
    deterministic: bool


@dataclass(frozen=True, slots=True)
class _Failed:
    """A call that cannot be computed, and why."""

    call: int
    fault: TenSafeFault


def _too_large(work: Pass) -> _Failed:
    tokens = f"{len(work.ids)} tokens"
    if len(work.lengths) == 1:
        what = f"a row of {tokens}, even by itself"
    elif work.is_one_unit:
        what = f"{len(work.lengths)} rows of {tokens}, which the loss needs together"
    else:
        what = f"a pass of {tokens}, which is not split because the run is deterministic"
    fault = TenSafeFault(
        "OUT_OF_MEMORY",
        f"the device has too little memory for {what}; use shorter sequences, a smaller rank, or "
        "a worker with more memory",
    )
    return _Failed(work.shares[0].call, fault)


def _loss_failed(calls: Sequence[Call], error: LossFunctionError) -> _Failed:
    loss = calls[error.call].objective.loss
    error_id = secrets.token_hex(6)
    log.error("the loss %s failed, error id %s", loss.name, error_id, exc_info=error)
    fault = TenSafeFault(
        "INTERNAL",
        f"the loss {loss.name}{', a plug-in of the operator,' * loss.card.plug_in} failed on this "
        f"call, error id {error_id}; tell the operator, whose log has the details",
        error_id=error_id,
        loss=loss.name,
    )
    return _Failed(error.call, fault)


def _fitting(
    model: BaseModel, calls: Sequence[Call], budget: TokenBudget, mode: _Mode
) -> list[Computed] | _Failed:
    """Tries with ever less memory: fewer tokens at once, then activations made anew.

    The budget learns of it only if all calls fit in the end: one that never does would take
    others' with it, and those beside it are owed the passes that they have without it.
    """
    batches = [call.batch for call in calls]
    trial = budget.trial()
    given_back = False
    while True:
        passes = cut(batches, trial.fixed if mode.deterministic else trial.together)
        try:
            with memory_faults("pass"):
                found = _attempt(model, calls, passes, mode, trial.frugal)
        except LossFunctionError as error:
            return _loss_failed(calls, error)
        if not isinstance(found, Pass):
            if mode.trains:
                sizes = [len(work.ids) for work in passes]
                plain = [size for size in sizes if size < trial.frugal]
                trial.spared(len(sizes) - len(plain))
                if not mode.deterministic:
                    trial.fitted(plain)
            budget.adopt(trial)
            return found
        # Nothing was counted yet: the next attempt begins with gradients of zero.
        give_back()
        tokens = len(found.ids)
        if not found.is_one_unit and not mode.deterministic:
            trial.halve(tokens)
        elif mode.trains and tokens < trial.frugal:
            trial.spare(tokens)
        elif mode.trains and tokens >= budget.frugal and not given_back:
            given_back = True  # by now, and this was its first attempt
        else:
            return _too_large(found)


def _attempt(
    model: BaseModel,
    calls: Sequence[Call],
    passes: Sequence[Pass],
    mode: _Mode,
    frugal_tokens: float,
) -> list[Computed] | Pass:
    """What came of the calls, or the pass that the memory did not suffice for.

    Args:
        frugal_tokens: passes of at least so many make their activations anew.
    """
    gradients = [call.adapter.cleared_gradient() for call in calls] if mode.trains else []
    for call in calls:
        if call.private is not None:
            call.private.begin()
    parts: list[tuple[Pass, list[PortionLoss]]] = []
    for work in passes:
        computed = _computed(model, calls, work, mode, len(work.ids) >= frugal_tokens)
        if computed is None:
            return work
        parts += computed
    found = gather(calls, parts, [l2_norm(gradient) for gradient in gradients])
    for each, gradient in zip(found, gradients, strict=mode.trains):
        each.grad_norm = certain(each.grad_norm, gradient)
    return found


def _computed(
    model: BaseModel, calls: Sequence[Call], work: Pass, mode: _Mode, frugal: bool
) -> list[tuple[Pass, list[PortionLoss]]] | None:
    """As `compute_in_strands`; None if the memory did not suffice, and what it took is free."""
    try:
        return compute_in_strands(
            model,
            calls,
            work,
            trains=mode.trains,
            drops=mode.drops,
            frugal=frugal,
            exact=mode.deterministic,
        )
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
    return None
