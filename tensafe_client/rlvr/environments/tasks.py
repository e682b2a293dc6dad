"""Procedurally generated tasks: datasets with the interface of `reasoning-gym` as environments.

Such a dataset has a length, gives entries `{"question", "answer", "metadata"}` by index, and judges
by `score_answer(answer, entry)`, 0 to 1. `reasoning_gym.create_dataset(name, …)` makes one (the
extra `tensafe[tasks]`), and `ChainSum` is one that needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tensafe_client.rlvr.environments.base import Problem, Prompt, Reply

Entry = Mapping[str, Any]


class TaskDataset(Protocol):
    """What `reasoning-gym`'s datasets have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry: ...

    def score_answer(self, answer: str | None, entry: Entry) -> float: ...


def first_line(completion: str) -> str:
    """The answer in a completion that begins with it: its first line, without white space."""
    return completion.strip().split("\n", 1)[0].strip()


@dataclass(frozen=True)
class Task:
    """A dataset as a single-turn environment.

    Args:
        dataset: with the interface of `reasoning-gym`.
        prompt: makes the prompt of a question; by default the question itself.
        answer: finds the answer in a completion.
    """

    dataset: TaskDataset
    prompt: Callable[[str], Prompt] = str
    answer: Callable[[str], str] = first_line

    def problem(self, index: int) -> Problem:
        entry = self.dataset[index % len(self.dataset)]
        return Problem(self.prompt(entry["question"]), {"entry": dict(entry)})

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        score = self.dataset.score_answer(self.answer(completions[-1]), problem.meta["entry"])
        return Reply({"reward": float(score), "correct": float(score == 1)})
