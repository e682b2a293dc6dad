"""From the DATA of `tensafe train` to datums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tensafe_client.data import Datum, Example, docstring_pairs, read_jsonl, split_by_module
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import BatchError

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
    if not Path(data).is_file():
        raise click.BadParameter(
            f"no file {data!r}, and the only built-in data is {STDLIB_DOCSTRINGS!r}",
            param_hint="DATA",
        )
    return Examples(read_jsonl(data), held_out)


def encode_examples(
    tokenizer: ChatTokenizer, examples: Sequence[Example], *, source: str, max_tokens: int | None
) -> list[Datum]:
    """Tokenises the examples in their order.

    Raises:
        BatchError: naming the number of an example that cannot be encoded.
    """
    datums = []
    for number, example in enumerate(examples, start=1):
        try:
            datums.append(tokenizer.datum(example, max_tokens=max_tokens))
        except BatchError as error:
            raise BatchError(f"{source}, example {number}: {error.message}") from error
    return datums
