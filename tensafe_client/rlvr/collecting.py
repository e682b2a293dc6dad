"""Lets a policy play: samples its turns, has them scored, and gives whole rollouts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.data.datum import token_array
from tensafe_client.errors import ConfigError
from tensafe_client.futures import OperationFuture
from tensafe_client.rlvr.environments import Environment, Prompt
from tensafe_client.rlvr.rollouts import Rollout
from tensafe_client.rlvr.scoring import Failure, ScoringPool
from tensafe_client.samples import SampleResult
from tensafe_client.training import TrainingClient


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; see `RLVRConfig`."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str | int] | None = None


@dataclass
class PendingBatch:
    """Rollouts whose first turn is being sampled.

    Attributes:
        sampled_at: batches that were learned from before it was sampled.
        seed: of all its turns.
    """

    sampled_at: int
    seed: int
    rollouts: list[Rollout]
    first_turn: OperationFuture[SampleResult]


@dataclass
class CollectedBatch:
    """Rollouts that have ended.

    Attributes:
        sampled_at: batches that were learned from before it was sampled.
        sampling_s, scoring_s: time that was waited for each, seconds.
    """

    sampled_at: int
    rollouts: list[Rollout]
    sampling_s: float = 0.0
    scoring_s: float = 0.0


class Collector:
    """Collects rollouts of one run in one environment.

    Args:
        tokenizer: None if all prompts are token ids and there is one turn.
        context_length: of the model, tokens; an episode ends before it is exceeded. 0: unknown.
    """

    def __init__(
        self,
        run: TrainingClient,
        environment: Environment,
        pool: ScoringPool,
        sampling: Sampling,
        *,
        max_turns: int,
        tokenizer: ChatTokenizer | None,
        context_length: int,
    ) -> None:
        self._run = run
        self._environment = environment
        self._pool = pool
        self._sampling = sampling
        self._max_turns = max_turns
        self._tokenizer = tokenizer
        self._context_length = context_length

    def begin(
        self, problems: Sequence[int], samples: int, *, sampled_at: int, seed: int
    ) -> PendingBatch:
        """Submits the first turn of `samples` rollouts for each problem; does not wait."""
        made = [self._environment.problem(index) for index in problems]
        prompts = [self._encode(problem.prompt) for problem in made]
        rollouts = [
            Rollout(problem, group, list(prompt))
            for group, (problem, prompt) in enumerate(zip(made, prompts, strict=True))
            for _ in range(samples)
        ]
        first = self._sample(prompts, samples, derived(seed, 0))
        return PendingBatch(sampled_at, seed, rollouts, first)

    def finish(self, batch: PendingBatch) -> CollectedBatch:
        """Waits for the first turn, and plays the rest."""
        collected = CollectedBatch(batch.sampled_at, batch.rollouts)
        live, future = batch.rollouts, batch.first_turn
        for turn in range(self._max_turns):
            begin = time.perf_counter()
            result = future.result()
            collected.sampling_s += time.perf_counter() - begin
            for rollout, sample in zip(live, result.samples, strict=True):
                rollout.write(sample, result.model_step)
            begin = time.perf_counter()
            live = self._score(live, last=turn == self._max_turns - 1)
            collected.scoring_s += time.perf_counter() - begin
            if not live:
                break
            prompts = [rollout.tokens for rollout in live]
            future = self._sample(prompts, 1, derived(batch.seed, turn + 1))
        return collected

    def _score(self, rollouts: Sequence[Rollout], *, last: bool) -> list[Rollout]:
        """Adds the newest turn's rewards; returns the rollouts that go on."""
        waiting = [self._pool.submit(rollout.problem, rollout.completions) for rollout in rollouts]
        going_on = []
        for rollout, scored in zip(rollouts, waiting, strict=True):
            reply = scored.result()
            if isinstance(reply, Failure):
                rollout.failure = reply
                continue
            rollout.score(reply.reward)
            if reply.then is not None and not last and not rollout.truncated:
                told = self._tokens_of(reply.then)
                # What is not followed by anything of the policy's teaches nothing.
                if self._fits(len(rollout.tokens) + len(told)):
                    rollout.read(told)
                    going_on.append(rollout)
                else:
                    rollout.truncated = True
        return going_on

    def _sample(
        self, prompts: Sequence[Sequence[int]], samples: int, seed: int
    ) -> OperationFuture[SampleResult]:
        how = self._sampling
        return self._run.sample_async(
            [list(prompt) for prompt in prompts],
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            stop=how.stop,
            num_samples=samples,
            seed=seed,
        )

    def _fits(self, tokens: int) -> bool:
        return not self._context_length or tokens < self._context_length

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._need_tokenizer("text").encode(prompt, add_special_tokens=True)
        items: Sequence[Any] = prompt
        if not len(items):
            raise ConfigError.of("environment", "has a prompt without tokens or messages")
        if isinstance(items[0], Integral):  # NumPy's too
            ids: list[int] = token_array("prompt", items).tolist()
            return ids
        tokenizer = self._need_tokenizer("messages")
        return tokenizer.encode(tokenizer.render(items, add_generation_prompt=True))

    def _tokens_of(self, text: str) -> list[int]:
        return self._need_tokenizer("what an environment says").encode(text)

    def _need_tokenizer(self, what: str) -> ChatTokenizer:
        if self._tokenizer is None:
            raise ConfigError.of(
                "environment",
                f"has {what}, and the model has no tokenizer",
                remedy="give prompts as token ids, or choose a model with a tokenizer",
            )
        return self._tokenizer


def derived(seed: int, part: int) -> int:
    """Another seed of 64 bits, a function of both."""
    digest = hashlib.blake2b(f"{seed}:{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
