"""Completions on their way, and the operations that they belong to."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from workers.engine.randomness import derive, uniform
from workers.engine.sampling.cache import Place
from workers.engine.sampling.distribution import Drawn
from workers.engine.sampling.prompts import EncodedPrompt
from workers.engine.sampling.stops import StopRule
from workers.engine.sampling.text import TextStream
from workers.engine.sampling.weights import PinnedWeights
from workers.operations import (
    Completion,
    FinishReason,
    Float32,
    Int32,
    SampleChunk,
    SampleOutcome,
    SampleRequest,
    SamplingParams,
)
from workers.sampler import OnChunk


@dataclass(eq=False, slots=True)
class Prefix:
    """A prompt's tokens, computed once for all rows that begin with them.

    Attributes:
        hidden: [D], of the last token, once it was computed.
        logprobs: float32 [P], if they were asked for.
        rows: those that have its keys and values now.
    """

    tokens: Int32
    hidden: Tensor | None = None
    logprobs: Float32 | None = None
    rows: list[Row] = field(default_factory=list)


class Row:
    """One completion.

    Attributes:
        order: its place among its operation's rows.
        limit: most tokens of it.
        place: where its keys and values lie while it runs.
        finish_reason: None while it goes on.
    """

    def __init__(
        self, job: Job, prompt: EncodedPrompt, prefix: Prefix, sample: int, key: int
    ) -> None:
        self.job, self.prompt, self.prefix, self.sample = job, prompt, prefix, sample
        room = job.weights.model.context_length - len(prompt.tokens)
        self.limit = min(job.params.max_tokens, room)
        self.order = prompt.index * job.params.num_samples + sample
        self.place: Place[Row] | None = None
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._key = key
        self._logprobs: list[float] = []
        self._raw_logprobs: list[float] = []
        self._top_tokens: list[list[int]] = []
        self._top_logprobs: list[list[float]] = []
        self._stream: TextStream | None = None
        self._text = ""
        self._decoded = 0
        self._told_tokens = self._told_characters = 0

    @property
    def params(self) -> SamplingParams:
        """How to choose its next token."""
        return self.job.params

    @property
    def capacity(self) -> int:
        """Most tokens whose keys and values it needs; nothing follows its last token."""
        return len(self.prompt.tokens) + self.limit - 1

    @property
    def context(self) -> list[int]:
        """All tokens so far."""
        return [*self.prompt.tokens.tolist(), *self.tokens]

    @property
    def point(self) -> float:
        """The number in [0, 1) that draws its next token."""
        return uniform(self._key, len(self.tokens))

    def add(self, drawn: Drawn, index: int) -> None:
        """Takes the token that was drawn for it, and ends if it is to end there."""
        token = drawn.tokens[index]
        self.tokens.append(token)
        self._logprobs.append(drawn.logprobs[index])
        self._raw_logprobs.append(drawn.raw_logprobs[index])
        if self.params.top_logprobs:
            self._top_tokens.append(drawn.top_tokens[index])
            self._top_logprobs.append(drawn.top_logprobs[index])
        if self.job.stop.is_end_token(token):
            self._end(FinishReason.STOP, self.tokens[:-1])
            return
        if self.job.reads_text:
            self._decode(self.tokens)
        if self.finish_reason is None and len(self.tokens) >= self.limit:
            self._end(FinishReason.LENGTH, self.tokens)

    def _end(self, reason: FinishReason, seen: list[int]) -> None:
        """Ends it, with the text of these tokens."""
        stream = self._decode(seen)
        if self.finish_reason is None:
            self._text += stream.finish()
            self.finish_reason = reason

    def _decode(self, tokens: list[int]) -> TextStream:
        stream = self._stream
        if stream is None:
            stream = TextStream(self.job.tokenizer, self.prompt.tokens.tolist())
            self._stream = stream
        for token in tokens[self._decoded :]:
            fresh = stream.add(token)
            self._text += fresh
            self._decoded += 1
            end = self.job.stop.find(self._text, len(fresh))
            if end is not None:
                self._text = self._text[:end]
                self.finish_reason = FinishReason.STOP
                break
        return stream

    def chunk(self) -> SampleChunk | None:
        """What it has more than at the last call; None if nothing."""
        certain = len(self._text)
        if self.finish_reason is None:
            certain -= self.job.stop.held_back(self._text)
        begin, end = self._told_tokens, len(self.tokens)
        text = self._text[self._told_characters : certain]
        if begin == end and not text:
            return None
        self._told_tokens, self._told_characters = end, max(certain, self._told_characters)
        return SampleChunk(
            operation_id=self.job.operation_id,
            prompt_index=self.prompt.index,
            sample=self.sample,
            position=begin,
            tokens=np.asarray(self.tokens[begin:], np.int32),
            logprobs=np.asarray(self._logprobs[begin:], np.float32),
            raw_logprobs=np.asarray(self._raw_logprobs[begin:], np.float32),
            text=text,
        )

    def completion(self) -> Completion:
        """What came of it, once it has ended."""
        if self.finish_reason is None:
            raise RuntimeError("the completion has not ended")
        tops = bool(self.params.top_logprobs)
        return Completion(
            prompt_index=self.prompt.index,
            prompt=self.prompt.text,
            text=self._text,
            tokens=np.asarray(self.tokens, np.int32),
            logprobs=np.asarray(self._logprobs, np.float32),
            raw_logprobs=np.asarray(self._raw_logprobs, np.float32),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt.tokens),
            top_tokens=np.asarray(self._top_tokens, np.int32) if tops else None,
            top_logprobs=np.asarray(self._top_logprobs, np.float32) if tops else None,
            prompt_logprobs=self.prefix.logprobs,
        )


class Job:
    """One operation.

    Args:
        draws: seed and name of what its draws come from.
        on_chunk: gets what is new of its rows; None if it does not stream.

    Attributes:
        rows: in the order of their outcomes.
        pending: rows that have no place yet, in their order.
        live: rows that have one.
        compute_ms: its share of the steps' time so far.
    """

    def __init__(
        self,
        operation_id: str,
        request: SampleRequest,
        weights: PinnedWeights,
        prompts: list[EncodedPrompt],
        draws: tuple[int, str | int],
        on_chunk: OnChunk | None,
    ) -> None:
        model = weights.model
        self.operation_id = operation_id
        self.params = request.params
        self.weights = weights
        self.stop = StopRule(model, request.params.stop)
        self.tokenizer: Any = model.tokenizer
        self.on_chunk = on_chunk
        self.reads_text = on_chunk is not None or bool(self.stop.texts)
        self.live = 0
        self.compute_ms = 0.0
        seed, name = draws
        prefixes: dict[bytes, Prefix] = {}
        self.rows = [
            Row(
                self,
                prompt,
                prefixes.setdefault(prompt.tokens.tobytes(), Prefix(prompt.tokens)),
                sample,
                derive(seed, "sample", name, prompt.index, sample),
            )
            for prompt in prompts
            for sample in range(request.params.num_samples)
        ]
        self.pending = deque(self.rows)

    @property
    def ended(self) -> bool:
        """Whether all its rows have."""
        return not (self.pending or self.live)

    @property
    def largest(self) -> int:
        """Tokens that its largest row may come to need."""
        return max(row.capacity for row in self.rows)

    def outcome(self) -> SampleOutcome:
        """What came of it, once it has ended."""
        completions = [row.completion() for row in self.rows]
        return SampleOutcome(completions, self.weights.step, self.compute_ms)
