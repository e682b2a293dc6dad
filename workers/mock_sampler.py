"""The mock backend's sampler: the same short text for every prompt, a byte of it a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workers.operations import (
    Completion,
    FinishReason,
    Prompt,
    SampleChunk,
    SampleOutcome,
    SampleRequest,
)
from workers.sampler import OnChunk


@dataclass(slots=True)
class _Job:
    """An operation on its way; `told`: how many tokens of each completion were streamed."""

    operation_id: str
    outcome: SampleOutcome
    num_samples: int
    on_chunk: OnChunk | None
    told: int = 0

    def tell(self) -> None:
        """Streams the next token of every completion."""
        if self.on_chunk is None:
            return
        part = slice(self.told, self.told + 1)
        for index, completion in enumerate(self.outcome.completions):
            if self.told < len(completion.tokens):
                chunk = SampleChunk(
                    operation_id=self.operation_id,
                    prompt_index=completion.prompt_index,
                    sample=index % self.num_samples,
                    position=self.told,
                    tokens=completion.tokens[part],
                    logprobs=completion.logprobs[part],
                    raw_logprobs=completion.raw_logprobs[part],
                    text=completion.text[part],
                )
                self.on_chunk(chunk)
        self.told += 1

    @property
    def ended(self) -> bool:
        longest = max(len(completion.tokens) for completion in self.outcome.completions)
        return self.on_chunk is None or self.told >= longest


class MockSampler:
    """A `Sampler` that ends an operation at its first step or, if it streams, gives a token of each
    completion a step."""

    def __init__(self, sample: Callable[[SampleRequest], SampleOutcome]) -> None:
        self._sample = sample
        self._jobs: dict[str, _Job] = {}

    def submit(
        self,
        operation_id: str,
        key: str | int,
        request: SampleRequest,
        on_chunk: OnChunk | None = None,
    ) -> None:
        outcome = self._sample(request)
        told_to = on_chunk if request.stream else None
        self._jobs[operation_id] = _Job(operation_id, outcome, request.params.num_samples, told_to)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def step(self) -> None:
        for job in self._jobs.values():
            job.tell()

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        ended = [operation_id for operation_id, job in self._jobs.items() if job.ended]
        return [(operation_id, self._jobs.pop(operation_id).outcome) for operation_id in ended]

    def cancel(self, operation_id: str) -> None:
        self._jobs.pop(operation_id, None)


def mock_completions(request: SampleRequest, step: int) -> list[Completion]:
    """What every prompt is continued with; it tells the step of the weights.

    At most `max_tokens` of it; the other ways to choose tokens have nothing to choose from here.
    Every log-probability is 0, as for the only token there is.
    """
    params = request.params
    whole = f" [Mock completion for step {step}]"
    text = whole[: params.max_tokens]
    tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    return [
        Completion(
            prompt_index=index,
            prompt=_prompt_text(prompt),
            text=text,
            tokens=tokens,
            logprobs=zeros,
            raw_logprobs=zeros,
            finish_reason=FinishReason.STOP if text == whole else FinishReason.LENGTH,
            prompt_tokens=_prompt_length(prompt),
            top_tokens=tokens[:, None] if params.top_logprobs else None,
            top_logprobs=zeros[:, None] if params.top_logprobs else None,
            prompt_logprobs=_prompt_logprobs(prompt) if params.prompt_logprobs else None,
        )
        for index, prompt in enumerate(request.prompts)
        for _ in range(params.num_samples)
    ]


def _prompt_text(prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    if prompt.chat is not None:
        return "\n".join(f"{message.role}: {message.content}" for message in prompt.chat)
    return ""


def _prompt_length(prompt: Prompt) -> int:
    return len(prompt.tokens) if prompt.tokens is not None else len(_prompt_text(prompt).encode())


def _prompt_logprobs(prompt: Prompt) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    logprobs = np.zeros(_prompt_length(prompt), np.float32)
    logprobs[:1] = np.nan
    return logprobs
