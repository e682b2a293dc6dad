"""Rewards: functions `fn(prompt, completion, meta) -> float | dict`, and a registry of them."""

from tensafe_client.rlvr.rewards.matching import (
    ExactMatch,
    JsonSchema,
    Keywords,
    Length,
    MathVerify,
    NumericMatch,
    RegexMatch,
)
from tensafe_client.rlvr.rewards.registry import (
    RewardFunction,
    register_reward,
    reward,
    rewards,
)
from tensafe_client.rlvr.rewards.weighted import WeightedSum

__all__ = [
    "ExactMatch",
    "JsonSchema",
    "Keywords",
    "Length",
    "MathVerify",
    "NumericMatch",
    "RegexMatch",
    "RewardFunction",
    "WeightedSum",
    "register_reward",
    "reward",
    "rewards",
]
