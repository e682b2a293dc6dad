"""Reinforcement learning with verifiable rewards: train a run on what a function says is right.

    from tensafe_client.rlvr import ChainSum, RLVRTrainer, Task

    RLVRTrainer(tc, Task(ChainSum()), {"iterations": 20, "max_tokens": 4}).run()

Rewards run on this side, in processes of their own. Needs the extra `tensafe[rlvr]`.
"""

from tensafe_client.rlvr import rewards
from tensafe_client.rlvr.config import RLVRConfig
from tensafe_client.rlvr.environments import (
    ChainSum,
    Environment,
    Problem,
    Prompt,
    PromptSet,
    Reply,
    Split,
    Task,
    TaskDataset,
    first_line,
    read_problems,
    same_terms,
)
from tensafe_client.rlvr.loop import RewardsFailedError, RLVRResult
from tensafe_client.rlvr.report import Evaluation, IterationReport
from tensafe_client.rlvr.trainer import RLVRTrainer
from tensafe_client.rlvr.warm_up import warm_up

__all__ = [
    "ChainSum",
    "Environment",
    "Evaluation",
    "IterationReport",
    "Problem",
    "Prompt",
    "PromptSet",
    "RLVRConfig",
    "RLVRResult",
    "RLVRTrainer",
    "Reply",
    "RewardsFailedError",
    "Split",
    "Task",
    "TaskDataset",
    "first_line",
    "read_problems",
    "rewards",
    "same_terms",
    "warm_up",
]
