"""Sampling as the parity tests ask for it, and what `forward` says of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from parity.tiny_runs import VOCABULARY

from workers.engine.engine import TorchBackend
from workers.operations import (
    Batch,
    Completion,
    LossRequest,
    Prompt,
    SampleOutcome,
    SampleRequest,
    SamplingParams,
    Stop,
)


def token_prompts(*lengths: int, seed: int = 6) -> list[Prompt]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [Prompt(tokens=rng.integers(3, VOCABULARY, n).astype(np.int32)) for n in lengths]


def request_for(
    prompts: list[Prompt], run: str | None = None, model: str = "tiny", **params
) -> SampleRequest:
    """From a run's current weights or, without one, the base model; nothing ends it early."""
    options = {"stop": Stop(), "max_tokens": 12} | params
    return SampleRequest(
        prompts, SamplingParams(**options), run_id=run, model_ref="" if run else model
    )


def sample(
    backend: TorchBackend, prompts: list[Prompt], run: str | None = None, *, key=1, **params
) -> list[Completion]:
    """One operation from beginning to end."""
    return backend.sample(key, request_for(prompts, run, **params)).completions


def sample_together(
    backend: TorchBackend, requests: dict[str, SampleRequest], *, later: int = 0
) -> dict[str, SampleOutcome | Exception]:
    """Operations at once, by name; each joins so many steps after the one before."""
    sampler = backend.sampler
    outcomes: dict[str, SampleOutcome | Exception] = {}
    for name, request in requests.items():
        sampler.submit(name, 1, request)
        for _ in range(later):
            sampler.step()
    while len(outcomes) < len(requests):
        sampler.step()
        outcomes |= dict(sampler.collect())
    assert not sampler.busy
    return outcomes


def completions_of(outcome: SampleOutcome | Exception) -> list[Completion]:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome.completions


def forward_logprobs(
    backend: TorchBackend, run: str, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[np.ndarray]:
    """What `forward` gives for each completion's tokens after its prompt."""
    batch = batch_of(prompts, completions)
    return by_completion(batch, backend.forward(run, LossRequest(batch)).logprobs, completions)


def trained_logprobs(
    backend: TorchBackend, run: str, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[np.ndarray]:
    """What a policy's `forward_backward` gives for them, before any update."""
    batch = batch_of(prompts, completions)
    sampled = np.zeros(len(batch.input_tokens), np.float32)
    for own, each in zip(by_completion(batch, sampled, completions), completions, strict=True):
        own[:] = each.raw_logprobs
    inputs = {"logprobs": sampled, "advantages": np.ones_like(sampled)}
    request = LossRequest(replace(batch, inputs=inputs), "ppo")
    logprobs = backend.forward_backward(run, 1, request).logprobs
    backend.drop_window(run)
    return by_completion(batch, logprobs, completions)


def batch_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Batch:
    """Completions behind their prompts; only the completions are scored."""
    rows = [
        np.concatenate([prompts[each.prompt_index].tokens, each.tokens]) for each in completions
    ]
    weights = [
        (np.arange(len(row) - 1) >= len(row) - 1 - len(each.tokens)).astype(np.float32)
        for row, each in zip(rows, completions, strict=True)
    ]
    return Batch(
        np.cumsum([0, *(len(row) - 1 for row in rows)], dtype=np.int64),
        np.concatenate([row[:-1] for row in rows]),
        np.concatenate([row[1:] for row in rows]),
        np.concatenate(weights),
    )


def by_completion(
    batch: Batch, values: np.ndarray, completions: Sequence[Completion]
) -> list[np.ndarray]:
    """Views of a batch's values, each completion's own."""
    ends = batch.offsets[1:]
    return [
        values[end - len(each.tokens) : end] for end, each in zip(ends, completions, strict=True)
    ]
