"""What `tensafe train rlvr` trains on: a task by its name, or a file of problems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tensafe_client.errors import ConfigError
from tensafe_client.rlvr import (
    ChainSum,
    Environment,
    PromptSet,
    Split,
    Task,
    read_problems,
    rewards,
    same_terms,
)

CHAIN_SUM = "chain-sum"
GYM = "gym:"
_HELD_OUT_SEED = 1_000_003
_SIZE = 1_000_000


@dataclass(frozen=True)
class Tasks:
    """Attributes: what is trained in, what is evaluated in (None for nothing), and what names the
    former, so that a resumed training has the same."""

    training: Environment
    held_out: Environment | None
    names: Mapping[str, str | int]


def read_tasks(
    task: str, reward: str | None, options: str | None, held_out: Path | None, seed: int
) -> Tasks:
    """Makes the environments.

    Args:
        task: `chain-sum`, `gym:NAME` (a task of `reasoning-gym`), or a JSONL file.
        reward: name of a reward; of files only.
        options: its options as JSON.
        held_out: JSONL; of files only, the others generate what they hold out.
        seed: of what is generated.

    Raises:
        click.UsageError: for options that do not go together.
        ConfigError, BatchError: naming what is wrong with the task, the reward or the file.
    """
    generated = task == CHAIN_SUM or task.startswith(GYM)
    if generated:
        if reward is not None or options is not None or held_out is not None:
            raise click.UsageError(
                "--reward, --reward-options and --eval-data are for files of problems: "
                f"{task} judges and holds out by itself"
            )
        return Tasks(
            _generated(task, seed, held_out=False),
            _generated(task, seed + _HELD_OUT_SEED, held_out=True),
            {"task": task, "task_seed": seed},
        )
    if not Path(task).is_file():
        raise click.BadParameter(
            f"{task!r} is no file, and none of {CHAIN_SUM}, {GYM}NAME", param_hint="TASK"
        )
    if seed:
        raise click.UsageError(f"--task-seed is for generated tasks: {task} is a file of problems")
    if reward is None:
        raise click.UsageError(
            f"a file of problems needs --reward, one of {', '.join(rewards.rewards())}"
        )
    parsed = _parsed(options)
    judge = rewards.reward(reward, **parsed)
    evaluated = None if held_out is None else PromptSet(read_problems(held_out), judge)
    digest = hashlib.sha256(Path(task).read_bytes()).hexdigest()
    names = {
        "task": f"file of sha256 {digest[:16]}",
        "reward": reward,
        "reward_options": json.dumps(parsed, sort_keys=True),
    }
    return Tasks(PromptSet(read_problems(task), judge), evaluated, names)


def _generated(task: str, seed: int, *, held_out: bool) -> Environment:
    if task == CHAIN_SUM:
        return Task(Split(ChainSum(seed=seed, size=_SIZE), held_out, same_terms))
    try:
        import reasoning_gym
    except ImportError as error:
        raise click.ClickException(
            f"{task} needs an extra: pip install 'tensafe[tasks]'"
        ) from error
    name = task.removeprefix(GYM)
    try:
        return Task(Split(reasoning_gym.create_dataset(name, seed=seed, size=_SIZE), held_out))
    except ValueError as error:
        raise ConfigError.of("task", f"reasoning-gym has none of the name {name!r}") from error


def _parsed(options: str | None) -> dict[str, Any]:
    try:
        parsed = json.loads(options or "{}")
    except ValueError as error:
        raise click.BadParameter(f"is no JSON: {error}", param_hint="--reward-options") from error
    if not isinstance(parsed, dict):
        raise click.BadParameter("must be a JSON object", param_hint="--reward-options")
    return parsed
