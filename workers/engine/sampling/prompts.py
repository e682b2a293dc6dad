"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.batches import check_tokens
from workers.operations import Int32, Prompt

_CHARACTERS_EACH = 64
"""What a prompt costs beside its length, as characters."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it; `index` is its place in the call."""

    index: int
    text: str
    tokens: Int32


class PromptReader:
    """Encodes the prompts of one call, some at a time: what else the worker does waits meanwhile.

    Attributes:
        encoded: those that are done, in the call's order.
    """

    def __init__(self, model: BaseModel, prompts: Sequence[Prompt]) -> None:
        self.encoded: list[EncodedPrompt] = []
        self._model = model
        self._prompts = prompts

    @property
    def complete(self) -> bool:
        """Whether all are encoded."""
        return len(self.encoded) == len(self._prompts)

    def read(self, characters: int) -> None:
        """Encodes the next prompts, of about so many characters together, one at least.

        Raises:
            TenSafeFault: NO_CHAT_TEMPLATE, TOKEN_OUT_OF_RANGE, CONTEXT_EXCEEDED; INVALID_ARGUMENT
                for an empty prompt, or text for a model without tokenizer.
        """
        while not self.complete and characters > 0:
            index = len(self.encoded)
            prompt = _encode(self._model, self._prompts[index], index)
            self.encoded.append(prompt)
            characters -= len(prompt.text) + _CHARACTERS_EACH


def _encode(model: BaseModel, prompt: Prompt, index: int) -> EncodedPrompt:
    where = f"prompts[{index}]"
    if prompt.tokens is not None:
        tokens = prompt.tokens
        check_tokens(tokens, model.vocabulary_size, f"{where}.tokens")
        text = decode(model, tokens.tolist())
    else:
        text, tokens = _from_text(model, prompt, where)
    if not len(tokens):
        raise TenSafeFault(
            "INVALID_ARGUMENT",
            f"{where} has no tokens, and there is nothing to continue; give at least one",
            field=where,
        )
    if len(tokens) >= model.context_length:
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"{where} has {len(tokens)} tokens, which leaves no room in the model's context of "
            f"{model.context_length}; shorten it",
            field=where,
            context_length=model.context_length,
        )
    return EncodedPrompt(index, text, tokens)


def _from_text(model: BaseModel, prompt: Prompt, where: str) -> tuple[str, Int32]:
    tokenizer = model.tokenizer
    if prompt.chat is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise TenSafeFault(
                "NO_CHAT_TEMPLATE",
                f"model {model.name} has no chat template; send the prompt as text or tokens",
                field=where,
                model=model.name,
            )
        messages = [{"role": m.role, "content": m.content} for m in prompt.chat]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            # The template is the model's own program; it refuses roles that it does not know.
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"{where}: the model's chat template refuses these messages; check their roles "
                "and their order",
                field=where,
            ) from error
        # The template has put the special tokens in.
        _check_length(model, text, where)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        if tokenizer is None:
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"model {model.name} has no tokenizer; send {where} as tokens",
                field=where,
            )
        text = prompt.text or ""
        _check_length(model, text, where)
        tokens = tokenizer(text)["input_ids"]
    return text, np.asarray(tokens, np.int32)


def _check_length(model: BaseModel, text: str, where: str) -> None:
    """Refuses what is far too long by its characters: every other run waits while it is encoded."""
    if len(text) > model.longest_text:
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"{where} has {len(text)} characters, and the model's context of "
            f"{model.context_length} tokens holds {model.longest_text} at most; shorten it",
            field=where,
            context_length=model.context_length,
        )


def decode(model: BaseModel, tokens: list[int]) -> str:
    """The tokens' text with special tokens; empty without tokenizer."""
    if model.tokenizer is None:
        return ""
    text: str = model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text
