"""Executes the forward or forward-and-backward work of one or several calls together.

Calls are isolated: one whose numbers are not finite is answered by itself, and the others get the
bits that they would have had without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.batches import ScoredBatch
from workers.engine.budget import TokenBudget
from workers.engine.memory import is_memory_error, memory_faults
from workers.engine.passes import Call, Pass, compute, cut
from workers.operations import Float32


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of one call; its gradient waits in its adapter, to be released.

    Attributes:
        loss_sum: Σ −w·logprob.
        grad_norm: of the summed gradient; 0 if nothing was trained.
        logprobs: float32 [N], or wider if the model is; 0 where nothing is scored.
    """

    loss_sum: float
    grad_norm: float
    logprobs: Float32


def execute(
    model: BaseModel,
    calls: Sequence[Call],
    budget: TokenBudget,
    *,
    trains: bool,
    deterministic: bool = False,
) -> list[Computed | TenSafeFault]:
    """Computes the calls in as few passes as the budget allows.

    A deterministic call must come alone. No two calls may have the same adapter if they train.

    Returns:
        What came of each, or OUT_OF_MEMORY for one with a row that does not fit by itself, not
        even with its activations made anew.

    Raises:
        TenSafeFault: OUT_OF_MEMORY, when there is not even room for the gradients.
    """
    found = _fitting(model, calls, budget, trains, deterministic)
    if isinstance(found, _Misfit):
        outcomes: list[Computed | TenSafeFault] = [_too_large(found.what)] * len(calls)
        rest = [index for index in range(len(calls)) if index != found.call]
        apart = [rest]
    else:
        outcomes = [*found]
        broken = _broken(found) if len(calls) > 1 else []
        # A product may have carried one call's NaN into a neighbour's sum; each is owed its own
        # bits.
        rest = [index for index in range(len(calls)) if index not in broken]
        apart = [rest, *([index] for index in broken)] if broken else []
    for members in apart:
        if members:
            own = [calls[index] for index in members]
            again = execute(model, own, budget, trains=trains, deterministic=deterministic)
            for index, outcome in zip(members, again, strict=True):
                outcomes[index] = outcome
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
class _Misfit:
    """A call that the device has no memory for, and what it was."""

    call: int
    what: str


def _misfit(work: Pass) -> _Misfit:
    tokens = f"{len(work.ids)} tokens"
    if len(work.lengths) == 1:
        return _Misfit(work.shares[0].call, f"a row of {tokens}, even by itself")
    return _Misfit(
        work.shares[0].call,
        f"a pass of {tokens}, which is not split because the run is deterministic",
    )


def _too_large(what: str) -> TenSafeFault:
    return TenSafeFault(
        "OUT_OF_MEMORY",
        f"the device has too little memory for {what}; use shorter sequences, a smaller rank, or "
        "a worker with more memory",
    )


def _fitting(
    model: BaseModel,
    calls: Sequence[Call],
    budget: TokenBudget,
    trains: bool,
    deterministic: bool,
) -> list[Computed] | _Misfit:
    """Tries with ever less memory: fewer tokens at once, then activations made anew."""
    batches = [call.batch for call in calls]
    frugal_tokens = math.inf
    while True:
        passes = cut(batches, budget.fixed if deterministic else budget.tokens)
        with memory_faults("pass"):
            found = _attempt(model, calls, passes, trains, frugal_tokens)
        if not isinstance(found, Pass):
            return found
        # Nothing was counted yet: the next attempt begins with gradients of zero.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = len(found.ids)
        if len(found.lengths) > 1 and not deterministic:
            budget.halve(tokens)
        elif trains and tokens < frugal_tokens:
            frugal_tokens = tokens
        else:
            return _misfit(found)


def _attempt(
    model: BaseModel,
    calls: Sequence[Call],
    passes: Sequence[Pass],
    trains: bool,
    frugal_tokens: float,
) -> list[Computed] | Pass:
    """What came of the calls, or the pass that the memory did not suffice for.

    Args:
        frugal_tokens: passes of at least so many make their activations anew.
    """
    gradients = [call.adapter.gradient().zero_() for call in calls] if trains else []
    losses: list[list[Tensor]] = [[] for _ in calls]
    logprobs = []
    for work in passes:
        computed = _computed(model, calls, work, trains, len(work.ids) >= frugal_tokens)
        if computed is None:
            return work
        logprobs.append(computed[0])
        for share, loss in zip(work.shares, computed[1].double(), strict=True):
            losses[share.call].append(loss)
    sums = torch.stack([torch.stack(parts).sum() for parts in losses])
    # In float64: with large weights the squares of a float32 gradient are infinite, with small
    # ones 0.
    wide = torch.float64
    norms = (
        torch.stack([torch.linalg.vector_norm(part, dtype=wide) for part in gradients])
        if gradients
        else torch.zeros_like(sums)
    )
    # One transfer from the device for all numbers, and one for all log-probabilities.
    loss_sums, grad_norms = torch.stack([sums, norms]).tolist()
    flat = torch.cat(logprobs).cpu().numpy()
    gathered = _gather([call.batch for call in calls], passes, flat)
    return [Computed(*each) for each in zip(loss_sums, grad_norms, gathered, strict=True)]


def _computed(
    model: BaseModel, calls: Sequence[Call], work: Pass, trains: bool, frugal: bool
) -> tuple[Tensor, Tensor] | None:
    """As `compute`; None if the memory did not suffice, and what it took is free again."""
    try:
        return compute(model, calls, work, trains=trains, frugal=frugal)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
    return None


def _gather(batches: Sequence[ScoredBatch], passes: Sequence[Pass], flat: Float32) -> list[Float32]:
    """Each batch's log-probabilities [N] in its own order."""
    gathered = [np.zeros(len(batch.tokens), flat.dtype) for batch in batches]
    begin = 0
    for work in passes:
        for share in work.shares:
            gathered[share.call][share.sources] = flat[begin:][share.scored]
        begin += len(work.scored)
    return gathered
