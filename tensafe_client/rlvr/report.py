"""What an iteration was like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tensafe_client.results import ForwardBackwardResult, OptimStepResult
from tensafe_client.rlvr.rollouts import Rollout


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems.

    Attributes:
        pass_rate: share of the problems that were solved.
        reward_mean: over those whose reward was computed.
        problems: how many there were.
        failed_rewards: how many of them have no reward; they count as not solved.
    """

    pass_rate: float
    reward_mean: float
    problems: int
    failed_rewards: int


@dataclass(frozen=True)
class IterationReport:
    """One batch of rollouts, and what was learned from it.

    Attributes:
        iteration: from 1.
        step: applied updates of the run after it.
        updates: made in it; 0 if nothing was left to learn from.
        reward_mean, reward_std, reward_min, reward_max: over all rollouts with a reward; NaN
            without one.
        pass_rate: share of the rollouts that solved their problem.
        parts: means of what rewards report beside.
        problems: that were learned from.
        equal_problems: that were left out since all their advantages are 0, as where all of a
            group's rewards are equal (`filter_equal_groups`).
        stale_rollouts: that were left out since the policy has learned too much since.
        failed_rewards: rollouts without a reward, by kind: "error", "timeout", "crash".
        response_tokens: mean length of what the policy wrote, tokens.
        truncated: share of the rollouts that `max_tokens` or the context has cut.
        entropy: mean of −log p of what was written, nats, p being the model's own at temperature 1
            and unfiltered, whatever was sampled with. Only then it estimates the policy's entropy.
        metrics: of the losses, by name (`clip_fraction`, `ratio_max`, `kl`, …), over all updates:
            sum, mean over the scored tokens, least or greatest, as the loss declares each.
        loss: of the last update, all its calls together.
        grad_norm: of the last update, before clipping; NaN if there was no update.
        learning_rate: of the last update.
        sampled_tokens, learned_tokens: how many.
        seconds: from the last iteration's end to this one's.
        sampling_wait_s, scoring_s, learning_wait_s: of them, waited for each.
        held_out: what an evaluation after it found, if there was one.
    """

    iteration: int
    step: int
    updates: int
    reward_mean: float
    reward_std: float
    reward_min: float
    reward_max: float
    pass_rate: float
    parts: Mapping[str, float]
    problems: int
    equal_problems: int
    stale_rollouts: int
    failed_rewards: Mapping[str, int]
    response_tokens: float
    truncated: float
    entropy: float
    metrics: Mapping[str, float]
    loss: float
    grad_norm: float
    learning_rate: float
    sampled_tokens: int
    learned_tokens: int
    seconds: float
    sampling_wait_s: float
    scoring_s: float
    learning_wait_s: float
    held_out: Evaluation | None = None

    @property
    def tokens_per_second(self) -> float:
        """Sampled and learned tokens."""
        return (self.sampled_tokens + self.learned_tokens) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Rewarded:
    """The rewards of rollouts, as numbers."""

    mean: float
    std: float
    least: float
    most: float
    pass_rate: float
    parts: Mapping[str, float] = field(default_factory=dict)


def passed(rollout: Rollout, pass_reward: float) -> bool:
    """Whether a rollout solved its problem."""
    if rollout.reward is None or rollout.failure is not None:
        return False
    if "correct" in rollout.parts:
        return rollout.parts["correct"] > 0
    return rollout.reward >= pass_reward


def rewarded(rollouts: Sequence[Rollout], pass_reward: float) -> Rewarded:
    """Sums up rewards; rollouts without one count as not solved."""
    scored = [one for one in rollouts if one.failure is None and one.reward is not None]
    solved = sum(passed(one, pass_reward) for one in rollouts) / max(1, len(rollouts))
    if not scored:
        nan = float("nan")
        return Rewarded(nan, nan, nan, nan, solved)
    values = np.asarray([one.reward for one in scored], np.float64)
    names = sorted({name for one in scored for name in one.parts})
    parts = {
        name: float(np.mean([one.parts[name] for one in scored if name in one.parts]))
        for name in names
    }
    return Rewarded(
        float(values.mean()),
        float(values.std()),
        float(values.min()),
        float(values.max()),
        solved,
        parts,
    )


def failures(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How many have no reward, by kind."""
    found: dict[str, int] = {}
    for rollout in rollouts:
        if rollout.failure is not None:
            found[rollout.failure.kind] = found.get(rollout.failure.kind, 0) + 1
    return found


def entropy(rollouts: Sequence[Rollout]) -> float:
    """Mean of −log p of the tokens that were written, by the model's own; NaN without any."""
    total = sum(sum(one.logprobs) for one in rollouts)
    count = sum(one.length for one in rollouts)
    return -total / count if count else float("nan")


_COUNTS = frozenset({"loss", "grad_norm", "tokens", "scored_tokens"})
_COMBINE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
}


def loss_metrics(results: Sequence[ForwardBackwardResult]) -> dict[str, float]:
    """What the losses report, combined over the calls as each metric's reduction says."""
    names = sorted({name for one in results for name in one.metrics} - _COUNTS)
    return {
        name: _combined(name, [one for one in results if name in one.metrics]) for name in names
    }


def _combined(name: str, results: Sequence[ForwardBackwardResult]) -> float:
    values = [one.metrics[name] for one in results]
    how = results[-1].reductions.get(name, "mean")
    if how in _COMBINE:
        return float(_COMBINE[how](values))
    weights = [one.metrics.get("scored_tokens", 1.0) for one in results]
    return float(np.average(values, weights=weights if sum(weights) else None))


def last_loss(updates: Sequence[Sequence[ForwardBackwardResult]]) -> float:
    """The loss of the newest update: a sum over its calls, as their reduction is; NaN without."""
    return math.fsum(call.loss for call in updates[-1]) if updates else float("nan")


def last_update(steps: Sequence[OptimStepResult]) -> tuple[float, float]:
    """Gradient norm and learning rate of the newest update; NaN if there was none."""
    if not steps:
        return float("nan"), float("nan")
    norm = steps[-1].grad_norm
    return float("nan") if norm is None else norm, steps[-1].learning_rate
