"""What decides an RLVR training, beside run and environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensafe_client.checks import (
    check_bool,
    check_count,
    check_fields,
    check_number,
    check_seconds,
    check_string,
)
from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.algorithms import ALGORITHMS, Algorithm

AGGREGATES = ("token", "sequence", "constant")
SCALES = ("group", "batch", "none")

_COUNTS_FROM_0 = ("top_k", "max_staleness", "eval_every", "checkpoint_every", "seed")
_COUNTS_FROM_1 = (
    *("iterations", "prompts", "group_size", "max_tokens", "max_turns", "inner_epochs"),
    *("minibatches", "max_batches", "reward_processes", "eval_problems"),
)
_HOTTEST = 100.0
"""The service samples no hotter."""
_NUMBERS = {
    "temperature": (0.0, _HOTTEST),
    "max_failed_rewards": (0.0, 1.0),
    "eval_temperature": (0.0, _HOTTEST),
    "pass_reward": (-math.inf, math.inf),
}
_OPTIONAL = {
    "learning_rate": (0.0, math.inf),
    "grad_clip_norm": (0.0, math.inf),
    "clip_low": (0.0, 1.0),
    "clip_high": (1.0, math.inf),
    "kl_coef": (0.0, math.inf),
    "entropy_coef": (0.0, math.inf),
    "baseline_decay": (0.0, 1.0),
}


@dataclass(frozen=True)
class RLVRConfig:
    """Configuration of `RLVRTrainer`. What is None has the algorithm's or the run's own value.

    Attributes:
        algorithm: "grpo", "rloo", "reinforce" or "ppo"; `tensafe_client.rlvr.algorithms`.
        iterations: batches of rollouts to learn from, over the run's whole training.
        prompts: problems of one batch.
        group_size: completions of each problem.
        max_tokens: longest completion of one turn, tokens.
        max_turns: most turns of one episode. It ends sooner where the environment says nothing
            more, and after a turn that `max_tokens` has cut, whatever a reply's `then` says; such
            episodes count as truncated.
        temperature, top_p, top_k: how rollouts are sampled. Importance ratios are of the model's
            own log-probabilities, whatever these are.
        stop: texts or token ids that end a completion beside the model's end token; empty: not
            even that ends it.
        learning_rate: of each update.
        grad_clip_norm: of each update.
        inner_epochs: how often each batch is gone through.
        minibatches: updates in each of them.
        clip_low, clip_high: bounds of the importance ratio. None: 0.8 and 1.2. Grpo and ppo only.
        kl_coef: weight of the KL divergence from the reference. 0 only measures it; None: neither.
        reference: artifact that the KL is to. None: the base model.
        entropy_coef: weight of the entropy bonus. 0 only measures the entropy; None: neither.
        aggregate: how tokens weigh: "token" (all the same), "sequence" (all rollouts the same) or
            "constant" (divided by max_tokens · max_turns, so that length has no bias; Liu et al.
            2025, arXiv 2503.20783).
        scale: what advantages are divided by: the standard deviation of the "group" or the
            "batch", or "none".
        baseline: what rewards are compared with: "batch_mean", "moving_average" or "none".
            Reinforce and ppo only.
        baseline_decay: of the moving average. None: 0.9.
        max_staleness: how many batches the policy may have learned since it sampled a rollout. 1
            lets the next batch be sampled while this one is learned; 0 waits.
        filter_equal_groups: leave out problems that teach nothing, all their advantages being 0:
            for grpo and rloo those whose rewards are all equal (Yu et al. 2025, arXiv 2503.14476),
            for reinforce and ppo those whose rewards all equal the baseline.
        max_batches: most batches to sample for one iteration until `prompts` problems are left by
            the filter.
        mask_truncated: learn nothing from completions that max_tokens has cut.
        reward_processes: processes that compute rewards.
        reward_timeout_s: most time for one reward, seconds.
        max_failed_rewards: share of a batch's rewards that may fail; more ends the training with
            `RewardsFailedError`.
        eval_every: evaluate on held-out problems after every so many iterations, before the first
            and after the last; 0: never.
        eval_problems: how many, from the first one on.
        eval_temperature: 0 takes the likeliest tokens.
        pass_reward: reward from which a problem counts as passed, unless the environment reports
            `correct`.
        checkpoint_every: save after every so many iterations too; 0: only at the end.
        seed: of the sampling, and of the order of minibatches.
    """

    algorithm: str = "grpo"
    iterations: int = 100
    prompts: int = 8
    group_size: int = 8
    max_tokens: int = 128
    max_turns: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str | int] | None = None
    learning_rate: float | None = None
    grad_clip_norm: float | None = None
    inner_epochs: int = 1
    minibatches: int = 1
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    reference: str | None = None
    entropy_coef: float | None = None
    aggregate: str = "token"
    scale: str | None = None
    baseline: str | None = None
    baseline_decay: float | None = None
    max_staleness: int = 1
    filter_equal_groups: bool = True
    max_batches: int = 1
    mask_truncated: bool = False
    reward_processes: int = 2
    reward_timeout_s: float = 10.0
    max_failed_rewards: float = 0.5
    eval_every: int = 0
    eval_problems: int = 64
    eval_temperature: float = 0.0
    pass_reward: float = 1.0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_word("algorithm", self.algorithm, tuple(ALGORITHMS))
        _check_word("aggregate", self.aggregate, AGGREGATES)
        for least, names in ((0, _COUNTS_FROM_0), (1, _COUNTS_FROM_1)):
            for name in names:
                if check_count(name, getattr(self, name), bits=53) < least:
                    raise ConfigError.of(name, f"must be {least} or more")
        for name, (low, high) in _NUMBERS.items():
            _check_range(name, getattr(self, name), low, high)
        for name, (low, high) in _OPTIONAL.items():
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low, high)
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise ConfigError.of("top_p", f"must be above 0, and at most 1, got {self.top_p!r}")
        check_seconds("reward_timeout_s", self.reward_timeout_s)
        for name in ("filter_equal_groups", "mask_truncated"):
            check_bool(name, getattr(self, name))
        if self.scale is not None:
            _check_word("scale", self.scale, SCALES)
        if self.reference is not None:
            check_string("reference", self.reference)
        if self.stop is not None:
            _check_stop(self.stop)
        self._refuse_what_has_no_effect()

    @classmethod
    def of(cls, config: RLVRConfig | Mapping[str, Any] | None) -> RLVRConfig:
        """Takes what the trainer takes: nothing, a dict or a config.

        Raises:
            ConfigError: for an unknown field, or a value that breaks a rule.
        """
        if config is None or isinstance(config, RLVRConfig):
            return config or cls()
        if not isinstance(config, Mapping):
            raise ConfigError.of("config", f"must be a dict or an RLVRConfig, got {config!r}")
        check_fields(cls.__name__, config, cls)
        return cls(**config)

    @property
    def rules(self) -> Algorithm:
        """What the algorithm is."""
        return ALGORITHMS[self.algorithm]

    def loss_config(self) -> dict[str, float | str]:
        """Options of the service's loss."""
        names = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "reference")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _refuse_what_has_no_effect(self) -> None:
        rules, name = self.rules, self.algorithm
        if not rules.clips:
            for bound in ("clip_low", "clip_high"):
                if getattr(self, bound) is not None:
                    raise ConfigError.of(bound, f"has no effect on {name}, which does not clip")
        if self.baseline is not None:
            if not rules.baselines:
                raise ConfigError.of(
                    "baseline", f"has no effect on {name}, which compares within groups"
                )
            _check_word("baseline", self.baseline, rules.baselines)
        if self.baseline_decay is not None and self.baseline != "moving_average":
            raise ConfigError.of("baseline_decay", "is of the baseline 'moving_average' only")
        if rules.compares_in_groups and self.group_size < 2:
            raise ConfigError.of("group_size", f"must be 2 or more: {name} compares within groups")
        if self.reference is not None and self.kl_coef is None:
            raise ConfigError.of("reference", "has no effect without kl_coef")
        if self.max_batches > 1 and not self.filter_equal_groups:
            raise ConfigError.of("max_batches", "has no effect without filter_equal_groups")
        for evaluated in ("eval_problems", "eval_temperature"):
            if not self.eval_every and getattr(self, evaluated) != getattr(RLVRConfig, evaluated):
                raise ConfigError.of(evaluated, "has no effect without eval_every")
        if self.minibatches > self.prompts * self.group_size:
            raise ConfigError.of("minibatches", "must be at most prompts times group_size")


def _check_word(field: str, value: object, words: Sequence[str]) -> None:
    if check_string(field, value) not in words:
        raise ConfigError.of(field, f"must be one of {', '.join(words)}, got {value!r}")


def _check_stop(stop: object) -> None:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise ConfigError.of("stop", f"must be a list of texts and token ids, got {stop!r}")
    for index, item in enumerate(stop):
        if not isinstance(item, str):
            check_count(f"stop[{index}]", item, bits=31)
        elif not check_string(f"stop[{index}]", item):
            raise ConfigError.of(f"stop[{index}]", "must not be empty: nothing ends at it")


def _check_range(field: str, value: object, low: float, high: float) -> None:
    number = check_number(field, value)
    if not low <= number <= high or math.isinf(number):
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more, and finite"
        raise ConfigError.of(field, f"must be {limits}, got {value!r}")
