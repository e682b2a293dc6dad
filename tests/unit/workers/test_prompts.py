"""Prompts that are too long by far are refused before they are encoded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from harness.tokenizers_of_kinds import byte_level, sentence_piece

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import _longest_token
from workers.engine.sampling.prompts import PromptReader
from workers.operations import Prompt

CONTEXT = 16


def encode(model, prompts):
    reader = PromptReader(model, prompts)
    reader.read(10**9)
    assert reader.complete
    return reader.encoded


class Counted:
    """A tokenizer, and how many texts it has encoded."""

    chat_template = "any"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.encoded = 0

    def __call__(self, text, **options):
        self.encoded += 1
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages, **options):
        return "".join(message["content"] for message in messages)


def model_with(tokenizer):
    longest = CONTEXT * _longest_token(tokenizer)
    return SimpleNamespace(
        name="tiny", tokenizer=Counted(tokenizer), context_length=CONTEXT, longest_text=longest
    )


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_text_that_no_tokens_could_hold_is_not_encoded(kind: str):
    model = model_with(byte_level())
    text = "a" * (model.longest_text + 1)
    prompt = (
        Prompt(text=text)
        if kind == "text"
        else Prompt(chat=[SimpleNamespace(role="user", content=text)])
    )
    with pytest.raises(TenSafeFault, match=f"has {len(text)} characters") as caught:
        encode(model, [prompt])
    assert caught.value.detail.reason == "CONTEXT_EXCEEDED"
    assert model.tokenizer.encoded == 0


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()], ids=["bytes", "pieces"])
def test_what_fits_is_never_refused_by_its_characters(tokenizer):
    model = model_with(tokenizer)
    [longest] = encode(model, [Prompt(text=" stop" * 4)])
    assert len(longest.tokens) < CONTEXT
    assert encode(model, [Prompt(text="stop" * 4)])


def test_what_does_not_fit_by_its_tokens_is_told_of_them():
    with pytest.raises(TenSafeFault, match=f"has {CONTEXT} tokens"):
        encode(model_with(byte_level()), [Prompt(text="a" * CONTEXT)])
