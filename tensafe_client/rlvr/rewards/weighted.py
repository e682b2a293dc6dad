"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_client.checks import check_number
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
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise ConfigError.of("parts", "must be a dict with at least one reward, by name")
        if "reward" in self.parts:
            raise ConfigError.of("parts", "cannot have one named 'reward': that is the sum")
        for name, part in self.parts.items():
            if not isinstance(part, tuple) or len(part) != 2 or not callable(part[1]):
                raise ConfigError.of(f"parts.{name}", f"must be (weight, reward), got {part!r}")
            if not math.isfinite(check_number(f"parts.{name}.weight", part[0])):
                raise ConfigError.of(f"parts.{name}.weight", f"must be finite, got {part[0]}")

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
    if not isinstance(parts, Mapping):
        raise ConfigError.of("parts", f"must be a dict of rewards by name, got {parts!r}")
    made = {}
    for name, options in parts.items():
        if not isinstance(options, Mapping):
            raise ConfigError.of(f"parts.{name}", f"must be a dict of options, got {options!r}")
        rest = dict(options)
        weight = rest.pop("weight", 1.0)
        made[name] = (weight, reward(name, **rest))
    return WeightedSum(made)
