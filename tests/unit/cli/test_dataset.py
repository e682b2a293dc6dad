"""What `tensafe train` says of data that does not fit the model."""

from __future__ import annotations

import json

import pytest

from tensafe_client import BatchError, ContextExceededError, NoChatTemplateError
from tensafe_client.cli.train.dataset import encode_examples
from tensafe_client.data import Datum, Example
from tensafe_client.data.chat import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    """One token for each word; its template takes no user named x."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "w": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    template = "{% if messages[0].role == 'x' %}{{ raise_exception('no x') }}{% endif %}" + template
    config = {"chat_template": template}
    return ChatTokenizer(
        {
            "tokenizer.json": made.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )


def words(count: int, line: int | None = None) -> Example:
    return Example(text=" ".join("w" * count), line=line)


def encode(
    tokenizer: ChatTokenizer,
    *examples: Example,
    max_tokens: int | None = None,
    context_length: int = 4,
) -> list[Datum]:
    return encode_examples(
        tokenizer, examples, source="f", max_tokens=max_tokens, context_length=context_length
    )


def test_the_context_is_full_but_not_exceeded(tokenizer: ChatTokenizer):
    # One word more than the context: the last one is predicted and not read.
    assert [len(datum) for datum in encode(tokenizer, words(5))] == [4]


def test_a_line_longer_than_the_context_is_named_with_the_remedy(tokenizer: ChatTokenizer):
    with pytest.raises(ContextExceededError) as caught:
        encode(tokenizer, words(3, line=1), words(6, line=7), words(9, line=8))
    text = str(caught.value)
    assert "f: line 7 has 5 tokens, the model's context is 4; 1 more" in text
    assert "--max-tokens 4" in text
    with pytest.raises(ContextExceededError, match="example 1 has 5"):
        encode(tokenizer, words(6))


def test_cut_lines_and_models_of_any_length_are_fine(tokenizer: ChatTokenizer):
    assert len(encode(tokenizer, words(9), max_tokens=4)[0]) == 4
    assert len(encode(tokenizer, words(9), context_length=0)[0]) == 8


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (Example(prompt="w w w", completion="w", line=9), "raise max_tokens"),
        (Example(text="w", line=9), "longer"),
        (Example(text="\ud800", line=9), "surrogate"),
        (
            Example(
                messages=(
                    {"role": "x", "content": "w"},
                    {"role": "assistant", "content": "w"},
                ),
                line=9,
            ),
            "template refuses the conversation: no x",
        ),
    ],
    ids=["cut", "short", "surrogate", "template"],
)
def test_a_line_that_cannot_be_encoded_is_named(
    tokenizer: ChatTokenizer, example: Example, says: str
):
    limit = 2 if example.completion else None
    with pytest.raises(BatchError) as caught:
        encode(tokenizer, words(3, line=4), example, max_tokens=limit)
    assert caught.value.message.startswith("f, line 9: ")
    assert says in caught.value.message


def test_a_line_that_needs_a_template_is_named(tokenizer: ChatTokenizer):
    plain = ChatTokenizer({"tokenizer.json": tokenizer._tokenizer.to_str().encode()})
    example = Example(messages=({"role": "assistant", "content": "w"},), line=2)
    with pytest.raises(NoChatTemplateError, match="line 2") as caught:
        encode(plain, example)
    assert "prompt/completion" in str(caught.value)
