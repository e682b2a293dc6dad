"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.rewards.outcomes import total
from tensafe_client.rlvr.rewards.registry import RewardFunction, register_reward, reward


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · reward; each part is reported under its name.

    Args:
        parts: (weight, reward) by the name to report.
    """

    parts: Mapping[str, tuple[float, RewardFunction]]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError.of("parts", "must have at least one reward")
        if "reward" in self.parts:
            raise ConfigError.of("parts", "cannot have one named 'reward': that is the sum")
        for name, (weight, _) in self.parts.items():
            if not math.isfinite(weight):
                raise ConfigError.of(f"parts.{name}", f"has the weight {weight}; it must be finite")

    def __call__(
        self, prompt: Any, completion: str, meta: Mapping[str, Any]
    ) -> Mapping[str, float]:
        found = {
            name: total(part(prompt, completion, meta)) for name, (_, part) in self.parts.items()
        }
        weights = {name: weight for name, (weight, _) in self.parts.items()}
        return found | {"reward": math.fsum(weights[name] * found[name] for name in found)}


@register_reward("weighted_sum")
def weighted_sum(parts: Mapping[str, Mapping[str, Any]]) -> WeightedSum:
    """From configuration: `{"exact_match": {"weight": 0.8}, "length": {"weight": 0.2, …}}`."""
    made = {}
    for name, options in parts.items():
        rest = dict(options)
        weight = float(rest.pop("weight", 1.0))
        made[name] = (weight, reward(name, **rest))
    return WeightedSum(made)
