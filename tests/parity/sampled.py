"""Sampling as the parity tests ask for it, and what `forward` says of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence

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
    rows = [
        np.concatenate([prompts[each.prompt_index].tokens, each.tokens]) for each in completions
    ]
    lengths = [len(prompts[each.prompt_index].tokens) for each in completions]
    weights = [
        (np.arange(len(row) - 1) >= length - 1).astype(np.float32)
        for row, length in zip(rows, lengths, strict=True)
    ]
    batch = Batch(
        np.cumsum([0, *(len(row) - 1 for row in rows)], dtype=np.int64),
        np.concatenate([row[:-1] for row in rows]),
        np.concatenate([row[1:] for row in rows]),
        np.concatenate(weights),
    )
    logprobs = backend.forward(run, LossRequest(batch)).logprobs
    ends = np.cumsum([len(row) - 1 for row in rows])
    return [
        logprobs[end - len(each.tokens) : end] for end, each in zip(ends, completions, strict=True)
    ]
