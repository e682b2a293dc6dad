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
) -> list[Computed]:
    """Computes the calls in as few passes as the budget allows.

    A deterministic call must come alone. No two calls may have the same adapter if they train.

    Raises:
        TenSafeFault: OUT_OF_MEMORY, even for single rows with their activations made anew.
    """
    found = _fitting(model, calls, budget, trains, deterministic)
    if len(calls) == 1:
        return found
    broken = _broken(found)
    if not broken:
        return found
    # A product may have carried one call's NaN into a neighbour's sum; each is owed its own bits.
    rest = [index for index in range(len(calls)) if index not in broken]
    for members in (rest, *([index] for index in broken)):
        if members:
            again = execute(model, [calls[index] for index in members], budget, trains=trains)
            for index, computed in zip(members, again, strict=True):
                found[index] = computed
    return found


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


def _fitting(
    model: BaseModel,
    calls: Sequence[Call],
    budget: TokenBudget,
    trains: bool,
    deterministic: bool,
) -> list[Computed]:
    """Tries with ever less memory: fewer tokens at once, then activations made anew."""
    batches = [call.batch for call in calls]
    frugal = False
    while True:
        passes = cut(batches, budget.fixed if deterministic else budget.tokens)
        splits = not deterministic and any(len(work.lengths) > 1 for work in passes)
        with memory_faults("pass"):
            try:
                return _attempt(model, calls, passes, trains, frugal)
            except (MemoryError, RuntimeError) as error:
                # Nothing was counted yet: the next attempt begins with gradients of zero.
                if not is_memory_error(error) or not (splits or (trains and not frugal)):
                    raise
        _free()
        if splits:
            budget.halve(max(len(work.ids) for work in passes))
        else:
            frugal = True


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _attempt(
    model: BaseModel, calls: Sequence[Call], passes: Sequence[Pass], trains: bool, frugal: bool
) -> list[Computed]:
    gradients = [call.adapter.gradient().zero_() for call in calls] if trains else []
    losses: list[list[Tensor]] = [[] for _ in calls]
    logprobs = []
    for work in passes:
        found, shares = compute(model, calls, work, trains=trains, frugal=frugal)
        logprobs.append(found)
        for share, loss in zip(work.shares, shares.double(), strict=True):
            losses[share.call].append(loss)
    sums = torch.stack([torch.stack(parts).sum() for parts in losses])
    norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros_like(sums)
    # One transfer from the device for all numbers, and one for all log-probabilities.
    loss_sums, grad_norms = torch.stack([sums, norms.double()]).tolist()
    flat = torch.cat(logprobs).cpu().numpy()
    gathered = _gather([call.batch for call in calls], passes, flat)
    return [Computed(*each) for each in zip(loss_sums, grad_norms, gathered, strict=True)]


def _gather(batches: Sequence[ScoredBatch], passes: Sequence[Pass], flat: Float32) -> list[Float32]:
    """Each batch's log-probabilities [N] in its own order."""
    gathered = [np.zeros(len(batch.tokens), flat.dtype) for batch in batches]
    begin = 0
    for work in passes:
        for share in work.shares:
            gathered[share.call][share.sources] = flat[begin:][share.scored]
        begin += len(work.scored)
    return gathered
