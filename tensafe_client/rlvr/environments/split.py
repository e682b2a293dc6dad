"""Generated tasks in two halves, of which one is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.environments.tasks import Entry, TaskDataset

_STRIDE = 2_654_435_761  # 2³² over the golden ratio: the next candidates lie far from each other


def question(entry: Entry) -> str:
    """What is asked."""
    return str(entry["question"])


@dataclass(frozen=True)
class Split:
    """Half of a dataset's questions: those whose hash falls on one side. The other half is all
    that the other split gives, whatever the datasets' seeds; so a small task, which generates the
    same questions again and again, can be held out, too.

    Args:
        dataset: with the interface of `reasoning-gym`.
        held_out: which half.
        key: what tells questions apart; what is alike here is in one half.
    """

    dataset: TaskDataset
    held_out: bool
    key: Callable[[Entry], str] = question

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} tasks")
        for attempt in range(len(self)):
            entry = self.dataset[(index + attempt * _STRIDE) % len(self)]
            if _is_held_out(self.key(entry)) == self.held_out:
                return dict(entry)
        half = "held-out" if self.held_out else "training"
        raise ConfigError.of(
            "dataset", f"has {len(self)} entries and none in the {half} half; give it more"
        )

    def score_answer(self, answer: str | None, entry: Entry) -> float:
        return self.dataset.score_answer(answer, entry)


def _is_held_out(key: str) -> bool:
    return bool(hashlib.blake2b(key.encode(), digest_size=1).digest()[0] & 1)
