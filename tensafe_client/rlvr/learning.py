"""One iteration's updates: rollouts with rewards become datums with advantages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tensafe_client.data import Datum
from tensafe_client.futures import OperationFuture
from tensafe_client.results import ForwardBackwardResult, OptimStepResult
from tensafe_client.rlvr.advantages import MovingAverage, advantages, is_equal, token_weights
from tensafe_client.rlvr.config import RLVRConfig
from tensafe_client.rlvr.rollouts import Rollout
from tensafe_client.training import TrainingClient

_TOKENS_PER_CALL = 262_144
"""A call's batch stays well below the size of a request: it has 20 bytes for each token."""


@dataclass(frozen=True)
class Item:
    """A rollout and its advantage."""

    rollout: Rollout
    advantage: float


@dataclass(frozen=True)
class Judged:
    """What there is to learn from rollouts.

    Attributes:
        items: what is learned from.
        problems: how many problems they, and those that `mask_truncated` has left out, are of.
        equal: problems left out since all their advantages are 0.
    """

    items: list[Item]
    problems: int
    equal: int


def grouped(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Those with a reward, by problem."""
    by_problem: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.failure is None:
            by_problem.setdefault(rollout.group, []).append(rollout)
    return list(by_problem.values())


def judge(
    groups: Sequence[Sequence[Rollout]], config: RLVRConfig, average: MovingAverage
) -> Judged:
    """Gives rollouts their advantages, and leaves out those that are not to be learned from.

    Args:
        groups: rollouts with rewards, by problem.
        average: of the baseline of that name; takes these rewards in.
    """
    rules = config.rules
    filters = config.filter_equal_groups
    # Before the scale, so that what compares nothing is no part of a batch's spread.
    told = list(groups)
    if filters and rules.compares_in_groups:
        told = [group for group in groups if not is_equal(_rewards(group))]
    found = advantages(
        [_rewards(group) for group in told],
        config.baseline or rules.baseline,
        config.scale or rules.scale,
        average,
    )
    kept = [
        (group, values)
        for group, values in zip(told, found, strict=True)
        if values.any() or not filters
    ]
    items = [
        Item(rollout, float(advantage))
        for group, values in kept
        for rollout, advantage in zip(group, values, strict=True)
        if not (config.mask_truncated and rollout.truncated)
    ]
    return Judged(items, len(kept), len(groups) - len(kept))


@dataclass
class Updates:
    """Updates that were submitted: the calls of each, and its step."""

    passes: list[list[OperationFuture[ForwardBackwardResult]]] = field(default_factory=list)
    steps: list[OperationFuture[OptimStepResult]] = field(default_factory=list)


def submit(run: TrainingClient, items: Sequence[Item], config: RLVRConfig, seed: int) -> Updates:
    """Submits all updates of an iteration, without waiting."""
    updates = Updates()
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    for _ in range(config.inner_epochs):
        order = list(items)
        draw.shuffle(order)
        for part in range(config.minibatches):
            batch = order[part :: config.minibatches]
            if batch:
                _update(run, batch, config, updates)
    return updates


def _update(
    run: TrainingClient, items: Sequence[Item], config: RLVRConfig, updates: Updates
) -> None:
    weights = token_weights(
        [item.rollout.length for item in items],
        config.aggregate,
        config.max_tokens * config.max_turns,
    )
    datums = [
        item.rollout.datum(item.advantage, weight)
        for item, weight in zip(items, weights, strict=True)
    ]
    updates.passes.append(
        [
            run.forward_backward(
                part, loss_fn=config.rules.loss, loss_config=config.loss_config(), reduction="sum"
            )
            for part in _calls(datums)
        ]
    )
    updates.steps.append(
        run.optim_step(learning_rate=config.learning_rate, grad_clip_norm=config.grad_clip_norm)
    )


def _calls(datums: Sequence[Datum]) -> list[list[Datum]]:
    """Cuts a batch into calls that fit a request: their gradients add up."""
    calls: list[list[Datum]] = []
    tokens = 0
    for datum in datums:
        if not calls or tokens + len(datum) > _TOKENS_PER_CALL:
            calls.append([])
            tokens = 0
        calls[-1].append(datum)
        tokens += len(datum)
    return calls


def _rewards(group: Sequence[Rollout]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.asarray([rollout.reward for rollout in group], np.float64)
