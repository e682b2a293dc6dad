"""`tensafe artifacts`: saved checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table, size


@click.group()
def artifacts() -> None:
    """List, show and download saved checkpoints."""


@examples("tensafe artifacts list", "tensafe artifacts list --run RUN --json")
@artifacts.command("list")
@click.option("--run", "run_id", metavar="RUN", help="Only those of this run.")
@json_option
@click.pass_context
def list_(ctx: click.Context, run_id: str | None, as_json: bool) -> None:
    """List the artifacts, newest first."""
    found = connect(ctx).artifacts(run_id)
    if as_json:
        print_json(found)
        return
    print_table(
        ("ARTIFACT", "RUN", "STEP", "MODEL", "SIZE", "RESUMABLE", "CREATED"),
        [
            (
                artifact.id,
                artifact.run_id,
                artifact.step,
                artifact.model_ref,
                size(artifact.size_bytes),
                "yes" if artifact.has_optimizer else "no",
                artifact.created_at,
            )
            for artifact in found
        ],
    )


@examples("tensafe artifacts show ARTIFACT")
@artifacts.command()
@click.argument("artifact_id", metavar="ARTIFACT")
@json_option
@click.pass_context
def show(ctx: click.Context, artifact_id: str, as_json: bool) -> None:
    """Show ARTIFACT, its metadata and its files."""
    artifact = connect(ctx).artifact(artifact_id)
    if as_json:
        print_json(artifact)
        return
    print_fields(
        [
            ("artifact", artifact.id),
            ("run", artifact.run_id),
            ("model", artifact.model_ref),
            ("step", artifact.step),
            ("size", size(artifact.size_bytes)),
            ("sha256", artifact.sha256),
            ("resumable", "yes" if artifact.has_optimizer else "no"),
            ("created", artifact.created_at),
            *((f"metadata.{name}", value) for name, value in artifact.metadata.items()),
        ]
    )
    click.echo()
    print_table(
        ("FILE", "SIZE", "SHA256"),
        [(file.name, size(file.size_bytes), file.sha256) for file in artifact.files],
    )


@examples(
    "tensafe artifacts download ARTIFACT ./adapter",
    "",
    "# then, anywhere:",
    'PeftModel.from_pretrained(base_model, "./adapter")',
)
@artifacts.command()
@click.argument("artifact_id", metavar="ARTIFACT")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@json_option
@click.pass_context
def download(ctx: click.Context, artifact_id: str, directory: Path, as_json: bool) -> None:
    """Download ARTIFACT into DIRECTORY, as plain `peft` loads it.

    Every file is checked against its SHA-256. A broken download goes on where it stopped when the
    command is repeated. What resuming on a service needs lies beside the adapter.
    """
    client = connect(ctx)
    artifact = client.artifact(artifact_id)
    client.download_artifact(artifact_id, directory)
    if as_json:
        print_json({"directory": str(directory), "artifact": artifact})
        return
    click.echo(f"Downloaded {artifact.id} ({size(artifact.size_bytes)}) to {directory}")
    for file in artifact.files:
        click.echo(f"  {directory / file.name}")
