"""From the DATA of `tensafe train` to datums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tensafe_client.data import Datum, Example, docstring_pairs, read_jsonl, split_by_module
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import BatchError, ContextExceededError, NoChatTemplateError

STDLIB_DOCSTRINGS = "stdlib-docstrings"


@dataclass(frozen=True)
class Examples:
    """What to learn, and what to evaluate on (empty: nothing was held out)."""

    train: Sequence[Example]
    held_out: Sequence[Example]


def read_examples(data: str, eval_data: Path | None) -> Examples:
    """Reads a JSONL file, or the built-in docstrings with their held-out modules.

    Raises:
        click.BadParameter: if there is no such file.
        BatchError: naming the number of a bad line.
    """
    held_out = [] if eval_data is None else read_jsonl(eval_data)
    if data == STDLIB_DOCSTRINGS:
        train, test = split_by_module(docstring_pairs())
        return Examples(
            [pair.example() for pair in train], held_out or [pair.example() for pair in test]
        )
    if not Path(data).exists() or Path(data).is_dir():
        raise click.BadParameter(
            f"no file {data!r}, and the only built-in data is {STDLIB_DOCSTRINGS!r}",
            param_hint="DATA",
        )
    return Examples(read_jsonl(data), held_out)


def encode_examples(
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
    *,
    source: str,
    max_tokens: int | None,
    context_length: int,
) -> list[Datum]:
    """Tokenises the examples in their order.

    Args:
        tokenizer: the model's.
        examples: what `read_examples` gives.
        source: the file's name, for messages.
        max_tokens: cut longer examples to so many tokens. None: never cut.
        context_length: longest sequence that the model takes, tokens; 0 if it takes any.

    Raises:
        BatchError: naming the line of an example that cannot be encoded.
        NoChatTemplateError: naming the line that needs one.
        ContextExceededError: naming the first line that is too long, and how many are.
    """
    datums = []
    too_long: list[str] = []
    for number, example in enumerate(examples, start=1):
        place = f"example {number}" if example.line is None else f"line {example.line}"
        try:
            datum = tokenizer.datum(example, max_tokens=max_tokens)
        except (BatchError, NoChatTemplateError) as error:
            text = f"{source}, {place}: {error.message}"
            raise type(error)(text, remedy=error.remedy) from error
        if context_length and len(datum) > context_length:
            too_long.append(f"{place} has {len(datum)} tokens")
        datums.append(datum)
    if too_long:
        others = f"; {len(too_long) - 1} more are too long" if len(too_long) > 1 else ""
        raise ContextExceededError(
            f"{source}: {too_long[0]}, the model's context is {context_length}{others}",
            remedy=f"cut by --max-tokens {context_length}, or shorten or split what is too long",
        )
    return datums
