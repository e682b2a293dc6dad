"""`tensafe datasets`: what the server draws the batches of private runs from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from tensafe_client import Datum, ServiceClient
from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table, size


@click.group()
def datasets() -> None:
    """Upload, list and delete datasets for private training."""


@examples(
    "tensafe datasets upload data.jsonl --model smollm2-135m",
    "tensafe datasets upload rows.jsonl --name notes",
)
@datasets.command()
@click.argument("data", metavar="FILE")
@click.option(
    "--model", metavar="MODEL", help="Whose tokenizer and chat template make tokens of text."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=2), help="Cut longer texts to so many tokens."
)
@click.option("--name", help="Free text for people.")
@json_option
@click.pass_context
def upload(
    ctx: click.Context,
    data: str,
    model: str | None,
    max_tokens: int | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Upload FILE, for the server to draw the batches of private runs from.

    \b
    Each line is a JSON object with text, as `tensafe train sft` takes it:
      {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
      {"prompt": "…", "completion": "…"}
      {"text": "…"}
    or with tokens:
      {"tokens": [5, 6, 7], "target_tokens": [6, 7, 8], "weights": [0, 1, 1]}
    and, where a private run shall protect all rows of a person together, "unit_id": "…".

    Tokens are made of text on this machine. A broken upload goes on where it stopped when the
    command is repeated.
    """
    text = _is_text(data)
    if text and model is None:
        raise click.UsageError(
            f"{data} is text: name the model whose tokenizer makes tokens of it, --model MODEL"
        )
    if not text and (model is not None or max_tokens is not None):
        raise click.UsageError(
            f"{data} has tokens already; leave --model and --max-tokens out, they are for text"
        )
    client = connect(ctx)
    source = Path(data) if model is None else _datums(client, data, model, max_tokens)
    dataset = client.upload_dataset(source, name)
    if as_json:
        print_json(dataset)
        return
    click.echo(
        f"Uploaded {data} ({dataset.examples} rows, {dataset.tokens} tokens) as {dataset.id}\n"
        f"Train on it:  tensafe train private {dataset.id} --model {model or 'MODEL'} --epsilon 8"
    )


def _is_text(data: str) -> bool:
    """Whether the first line has no tokens. What is no JSON object is the server's to name."""
    from tensafe_client.cli.train.dataset import STDLIB_DOCSTRINGS

    if data == STDLIB_DOCSTRINGS:
        return True
    if not Path(data).is_file():
        raise click.BadParameter(f"no file {data!r}", param_hint="FILE")
    with Path(data).open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "tokens" not in row


def _datums(
    client: ServiceClient, data: str, model: str, max_tokens: int | None
) -> Sequence[Datum]:
    """Text as tokens; prompts have no weight."""
    from tensafe_client.cli.train.dataset import encode_examples, read_examples
    from tensafe_client.cli.train.run_options import tokenizer_of

    found = read_examples(data, None).train
    datums = encode_examples(
        tokenizer_of(client, model),
        found,
        source=data,
        max_tokens=max_tokens,
        context_length=client.model(model).context_length,
    )
    for datum, example in zip(datums, found, strict=True):
        datum.unit_id = example.unit_id
    return datums


@examples("tensafe datasets list")
@datasets.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """List the datasets, newest first."""
    found = connect(ctx).datasets()
    if as_json:
        print_json(found)
        return
    rows = [
        (one.id, one.name, one.examples, one.unit_ids or "none", one.tokens, size(one.size_bytes))
        for one in found
    ]
    print_table(("DATASET", "NAME", "ROWS", "UNITS", "TOKENS", "SIZE"), rows)


@examples("tensafe datasets show DATASET")
@datasets.command()
@click.argument("dataset_id", metavar="DATASET")
@json_option
@click.pass_context
def show(ctx: click.Context, dataset_id: str, as_json: bool) -> None:
    """Show DATASET."""
    one = connect(ctx).dataset(dataset_id)
    if as_json:
        print_json(one)
        return
    print_fields(
        [
            ("dataset", one.id),
            ("name", one.name or None),
            ("rows", one.examples),
            ("unit ids", one.unit_ids),
            ("tokens", one.tokens),
            ("longest row", one.longest),
            ("size", size(one.size_bytes)),
            ("sha256", one.sha256),
            ("uploaded", one.created_at.isoformat(timespec="seconds")),
        ]
    )


@examples("tensafe datasets delete DATASET")
@datasets.command()
@click.argument("dataset_id", metavar="DATASET")
@json_option
@click.pass_context
def delete(ctx: click.Context, dataset_id: str, as_json: bool) -> None:
    """Delete DATASET. Its privacy ledger stays, and goes on if the same is uploaded again."""
    connect(ctx).delete_dataset(dataset_id)
    if as_json:
        print_json({"deleted": [dataset_id]})
    else:
        click.echo(f"Deleted {dataset_id}")
