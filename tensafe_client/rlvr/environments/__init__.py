"""Environments: single-turn prompt sets, generated tasks, and the protocol of all."""

from tensafe_client.rlvr.environments.base import Environment, Problem, Prompt, Reply
from tensafe_client.rlvr.environments.chain_sum import ChainSum, same_terms
from tensafe_client.rlvr.environments.prompts import PromptSet, read_problems
from tensafe_client.rlvr.environments.split import Split
from tensafe_client.rlvr.environments.tasks import Task, TaskDataset, first_line

__all__ = [
    "ChainSum",
    "Environment",
    "Problem",
    "Prompt",
    "PromptSet",
    "Reply",
    "Split",
    "Task",
    "TaskDataset",
    "first_line",
    "read_problems",
    "same_terms",
]
