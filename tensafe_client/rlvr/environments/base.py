"""What a policy is trained in: problems to solve, and what follows each completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages, to which the model's template is applied."""


@dataclass(frozen=True)
class Problem:
    """One thing to solve.

    Attributes:
        prompt: what the policy reads first.
        meta: what the reward needs, such as `answer`; must be picklable.
    """

    prompt: Prompt
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What follows a completion.

    Attributes:
        reward: of this turn; a mapping has it under `reward`, and its other numbers are reported
            as metrics by their names.
        then: text that the policy reads next, after its completion; None ends the episode. Not
            read after a turn that `max_tokens` cut: that ends the episode.
    """

    reward: float | Mapping[str, float]
    then: str | None = None


class Environment(Protocol):
    """Problems by index, and their outcomes.

    Both methods must be functions of their arguments alone: a resumed training asks again. `reply`
    runs in other processes, so an environment must be picklable by `cloudpickle`.
    """

    def problem(self, index: int) -> Problem:
        """The problem of an index, 0 or more. An environment of n problems begins anew at n."""

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        """What follows the newest of an episode's completions.

        An episode's reward is the sum of its replies'. An exception is counted as an error of the
        reward, and its episode is left out of the update.
        """
