"""`tensafe artifacts`: saved checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table, size

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    match = _TIME.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a time such as 90m, 12h or 7d")
    return float(match[1]) * _UNIT_S[match[2]]


def _json_object(
    context: click.Context, option: click.Parameter, value: str | None
) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter("is not a JSON object")
    return parsed


@click.group()
def artifacts() -> None:
    """List, show, download, upload and delete saved checkpoints."""


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
        ("ARTIFACT", "RUN", "STEP", "MODEL", "SIZE", "RESUMABLE", "CREATED", "EXPIRES"),
        [
            (
                artifact.id,
                artifact.run_id,
                artifact.step,
                artifact.model_ref,
                size(artifact.size_bytes),
                "yes" if artifact.has_optimizer else "no",
                artifact.created_at,
                artifact.expires_at,
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
            ("expires", artifact.expires_at),
            ("lora rank", artifact.adapter.rank),
            ("lora alpha", artifact.adapter.alpha),
            ("lora modules", artifact.adapter.target_modules),
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


@examples(
    "tensafe artifacts upload ./adapter --model smollm2-135m",
    "tensafe artifacts upload ./adapter --model smollm2-135m --ttl 7d",
)
@artifacts.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", "model_ref", metavar="REF", required=True, help="Its base model.")
@click.option("--metadata", metavar="JSON", callback=_json_object, help="Kept with it.")
@click.option(
    "--ttl",
    metavar="TIME",
    callback=_seconds,
    help="How long it is kept, as 90m, 12h or 7d.  [default: until it is deleted]",
)
@json_option
@click.pass_context
def upload(
    ctx: click.Context,
    directory: Path,
    model_ref: str,
    metadata: dict[str, Any] | None,
    ttl: float | None,
    as_json: bool,
) -> None:
    """Upload the adapter in DIRECTORY, which `peft` has saved, as an artifact.

    Sent are adapter_config.json and adapter_model.safetensors; anything else stays. A broken upload
    goes on where it stopped when the command is repeated.
    """
    artifact = connect(ctx).upload_artifact(directory, model_ref, metadata=metadata, ttl_s=ttl)
    if as_json:
        print_json(artifact)
        return
    click.echo(f"Uploaded {directory} ({size(artifact.size_bytes)}) as {artifact.id}")


@examples("tensafe artifacts delete ARTIFACT")
@artifacts.command()
@click.argument("artifact_ids", metavar="ARTIFACT", nargs=-1, required=True)
@json_option
@click.pass_context
def delete(ctx: click.Context, artifact_ids: tuple[str, ...], as_json: bool) -> None:
    """Delete ARTIFACT and its files; several may be named.

    One that a run's recovery begins at, or that an unfinished operation reads, is not deleted.
    """
    client = connect(ctx)
    for artifact_id in artifact_ids:
        client.delete_artifact(artifact_id)
        if not as_json:
            click.echo(f"Deleted {artifact_id}")
    if as_json:
        print_json({"deleted": list(artifact_ids)})
