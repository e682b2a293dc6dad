"""Single-turn environments: prompts, each with a reward for its completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensafe_client.checks import check_path
from tensafe_client.data.jsonl import check_characters
from tensafe_client.errors import BatchError, ConfigError
from tensafe_client.rlvr.environments.base import Problem, Reply
from tensafe_client.rlvr.rewards import RewardFunction


@dataclass(frozen=True)
class PromptSet:
    """A list of problems and a reward.

        PromptSet([Problem("2 + 2 =", {"answer": "4"})], rewards.ExactMatch())

    Args:
        problems: at least one.
        reward: `fn(prompt, completion, meta) -> float | dict`.
    """

    problems: Sequence[Problem]
    reward: RewardFunction

    def __post_init__(self) -> None:
        if not self.problems:
            raise ConfigError.of("problems", "must have at least one problem")
        if not callable(self.reward):
            raise ConfigError.of("reward", f"must be a function, got {self.reward!r}")

    def problem(self, index: int) -> Problem:
        return self.problems[index % len(self.problems)]

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        return Reply(self.reward(problem.prompt, completions[-1], problem.meta))


def read_problems(path: str | Path) -> list[Problem]:
    """Reads problems from JSONL: `prompt` (text or messages) on each line, the rest is `meta`.

    Raises:
        BatchError: naming the number of a bad line and what is wrong with it.
    """
    problems = []
    with check_path("path", path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    problems.append(_problem(json.loads(line)))
                except BatchError as error:
                    raise BatchError(f"{path}, line {number}: {error.message}") from error
                except ValueError as error:
                    raise BatchError(f"{path}, line {number}: is no JSON: {error}") from error
    if not problems:
        raise BatchError(f"{path} has no problems")
    return problems


def _problem(record: object) -> Problem:
    if not isinstance(record, dict) or "prompt" not in record:
        raise BatchError("must be a JSON object with `prompt`")
    prompt = record.pop("prompt")
    if isinstance(prompt, str) and prompt:
        check_characters("`prompt`", prompt)
        return Problem(prompt, record)
    is_chat = isinstance(prompt, list) and all(
        isinstance(item, dict)
        and item.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in item.values())
        for item in prompt
    )
    if not prompt or not is_chat:
        raise BatchError("`prompt` must be text, or a list of messages with role and content")
    return Problem(prompt, record)
