"""`tensafe datasets`: what the server draws the batches of private runs from."""

from __future__ import annotations

from pathlib import Path

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table, size


@click.group()
def datasets() -> None:
    """Upload, list and delete datasets for private training."""


@examples("tensafe datasets upload rows.jsonl", "tensafe datasets upload rows.jsonl --name notes")
@datasets.command()
@click.argument(
    "path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--name", help="Free text for people.")
@json_option
@click.pass_context
def upload(ctx: click.Context, path: Path, name: str | None, as_json: bool) -> None:
    """Upload FILE, for the server to draw the batches of private runs from.

    Each line is a JSON object with tokens, target_tokens, maybe weights and unit_id. A broken
    upload goes on where it stopped when the command is repeated.
    """
    dataset = connect(ctx).upload_dataset(path, name)
    if as_json:
        print_json(dataset)
        return
    click.echo(
        f"Uploaded {path} ({dataset.examples} rows, {dataset.tokens} tokens) as {dataset.id}"
    )


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
