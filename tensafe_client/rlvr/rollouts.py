"""Episodes of a policy in an environment, as what they are learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tensafe.wire.tensors import Array
from tensafe_client.data import Datum
from tensafe_client.rlvr.environments import Problem
from tensafe_client.rlvr.scoring import Failure
from tensafe_client.samples import Sample


@dataclass
class Rollout:
    """One episode: what the policy read and wrote, in order.

    Attributes:
        group: which problem of the batch, from 0.
        tokens: everything, prompt first.
        written: for each token, whether the policy wrote it.
        logprobs: for each token, the model's own log-probability when it was written; 0 elsewhere.
        completions: the text of each turn.
        version: fewest applied updates that the weights of a turn had.
        truncated: whether `max_tokens` cut a turn, which ends the episode, or the context did.
        reward: sum over the turns; None until it is known.
        parts: what rewards report beside, by name; summed over the turns.
        failure: why there is no reward.
    """

    problem: Problem
    group: int
    tokens: list[int]
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    version: int | None = None
    truncated: bool = False
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    def __post_init__(self) -> None:
        self.written = [False] * len(self.tokens)
        self.logprobs = [0.0] * len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.written)

    def write(self, sample: Sample, version: int) -> None:
        """Adds a completion."""
        tokens = sample.tokens.tolist()
        self.tokens += tokens
        self.written += [True] * len(tokens)
        self.logprobs += sample.raw_logprobs.tolist()
        self.completions.append(sample.completion)
        self.version = version if self.version is None else min(self.version, version)
        self.truncated |= sample.finish_reason == "length"

    def read(self, tokens: Sequence[int]) -> None:
        """Adds what the environment says."""
        self.tokens += tokens
        self.written += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def score(self, reward: float | Mapping[str, float]) -> None:
        """Adds a turn's reward, and its parts."""
        parts = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
        self.reward = (self.reward or 0.0) + parts.pop("reward")
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    def datum(self, advantage: float, weight: float) -> Datum:
        """What a policy loss learns from: each written token with its advantage and weight."""
        written = np.asarray(self.written[1:])
        logprobs = np.asarray(self.logprobs[1:], np.float32)
        tokens: Array = np.asarray(self.tokens, np.int32)
        return Datum(
            tokens[:-1],
            tokens[1:],
            np.where(written, weight, 0.0).astype(np.float32),
            logprobs=logprobs,
            advantages=np.where(written, advantage, 0.0).astype(np.float32),
        )
