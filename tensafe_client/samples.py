"""What `sample` gives: completions, and the pieces of them that a stream brings."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

import numpy as np

from tensafe.v1 import operations_pb2 as pb
from tensafe.v1 import types_pb2
from tensafe.wire.tensors import Array, decode

_SHOWN = reprlib.Repr()
_SHOWN.maxstring, _SHOWN.maxlist, _SHOWN.maxother = 60, 3, 120
_FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, eq=False, repr=False)
class Sample:
    """One completion of G tokens, of a prompt of P.

    Its tokens are all that were sampled, the one included that ended it: choosing that one was
    part of the policy. Its text has neither that token nor the stop text.

    Attributes:
        prompt: the prompt as the model read it.
        completion: the generated text.
        tokens_generated: G.
        finish_reason: "stop" (an end token or a stop condition) or "length".
        prompt_index: which prompt of the call it continues, from 0.
        prompt_tokens: P.
        sample_index: which of its prompt's completions it is, from 0.
        tokens: int32 [G]: the sampled tokens.
        logprobs: float32 [G]: log-probability of each under the distribution sampled from, after
            temperature and filters; 0 at temperature 0.
        raw_logprobs: float32 [G]: of each under the model itself, as `forward` gives them.
        top_tokens: int32 [G, k]: the k likeliest at each place under the model itself, the
            likeliest first; None unless `top_logprobs=k` was asked for.
        top_logprobs: float32 [G, k]: their log-probabilities; None likewise.
        prompt_logprobs: float32 [P]: log-probability of each token of the prompt after those before
            it, NaN for the first; None unless `prompt_logprobs=True` was asked for.
    """

    prompt: str
    completion: str
    tokens_generated: int
    finish_reason: str
    prompt_index: int
    prompt_tokens: int
    sample_index: int
    tokens: Array
    logprobs: Array
    raw_logprobs: Array
    top_tokens: Array | None = None
    top_logprobs: Array | None = None
    prompt_logprobs: Array | None = None

    @classmethod
    def from_proto(cls, message: pb.Completion) -> Sample:
        """Unpacks a completion."""
        tokens = _tokens(message.tokens)
        reason = _FINISH_REASONS.get(message.finish_reason, f"unknown_{message.finish_reason}")
        return cls(
            prompt=message.prompt,
            completion=message.completion,
            tokens_generated=len(tokens),
            finish_reason=reason,
            prompt_index=message.prompt_index,
            prompt_tokens=message.prompt_tokens,
            sample_index=message.sample_index,
            tokens=tokens,
            logprobs=_numbers(message.logprobs),
            raw_logprobs=_numbers(message.raw_logprobs),
            top_tokens=decode(message.top_tokens) if message.HasField("top_tokens") else None,
            top_logprobs=decode(message.top_logprobs) if message.HasField("top_logprobs") else None,
            prompt_logprobs=(
                decode(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None
            ),
        )

    def __repr__(self) -> str:
        text = _SHOWN.repr(self.completion)
        return f"<Sample {text} {self.tokens_generated} tokens, {self.finish_reason}>"


@dataclass(frozen=True, eq=False, repr=False)
class SampleResult:
    """Result of `sample`.

    Attributes:
        samples: for each prompt in order, its completions.
        model_step: applied updates of the weights sampled from; 0 for a base model.
    """

    samples: list[Sample]
    model_step: int

    @classmethod
    def from_proto(cls, message: pb.SampleResult) -> SampleResult:
        """Unpacks a result."""
        samples = [Sample.from_proto(completion) for completion in message.completions]
        return cls(samples, message.model_step)

    def __repr__(self) -> str:
        shown = _SHOWN.repr(self.samples)
        return f"<SampleResult of step {self.model_step}: {len(self.samples)} in {shown}>"


@dataclass(frozen=True, eq=False)
class SampleChunk:
    """Tokens of one completion that follow those of its chunk before, and text that has become
    certain: it may lag behind the tokens, and ends with the completion's.

    Attributes:
        text: maybe empty.
        tokens: int32 [T], maybe none.
        position: tokens of the completion before these.
        prompt_index: which prompt of the call the completion continues, from 0.
        sample_index: which of its prompt's completions it is, from 0.
        logprobs, raw_logprobs: float32 [T], as in `Sample`.
    """

    text: str
    tokens: Array
    position: int
    prompt_index: int
    sample_index: int
    logprobs: Array = field(repr=False)
    raw_logprobs: Array = field(repr=False)

    @classmethod
    def from_proto(cls, message: pb.TokenChunk) -> SampleChunk:
        """Unpacks a chunk."""
        return cls(
            text=message.text,
            tokens=_tokens(message.tokens),
            position=message.position,
            prompt_index=message.prompt_index,
            sample_index=message.sample_index,
            logprobs=_numbers(message.logprobs),
            raw_logprobs=_numbers(message.raw_logprobs),
        )

    def after(self, tokens: int, text: int) -> SampleChunk:
        """Without its first tokens and the first characters of its text."""
        return SampleChunk(
            text=self.text[text:],
            tokens=self.tokens[tokens:],
            position=self.position + tokens,
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            logprobs=self.logprobs[tokens:],
            raw_logprobs=self.raw_logprobs[tokens:],
        )


def _tokens(tensor: types_pb2.Tensor) -> Array:
    return decode(tensor) if tensor.dtype else np.zeros(0, np.int32)


def _numbers(tensor: types_pb2.Tensor) -> Array:
    return decode(tensor) if tensor.dtype else np.zeros(0, np.float32)
