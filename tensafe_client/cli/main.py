"""The root of the command line: global options, the list of commands, errors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from tensafe_client.cli.connecting import Connection
from tensafe_client.cli.failures import INTERRUPTED, ServiceFailure
from tensafe_client.cli.lazy import LazyCommand, LazyGroup, examples
from tensafe_client.errors import TenSafeError

COMMANDS = {
    "up": LazyCommand(
        "tensafe_server.cli:up",
        "Start a coordinator and its workers on this machine.",
        extra="server,worker",
        serves=True,
    ),
    "server": LazyCommand(
        "tensafe_server.cli:server", "Start a coordinator alone.", extra="server", serves=True
    ),
    "worker": LazyCommand(
        "workers.cli:worker", "Start a worker and connect it to a coordinator.", extra="worker"
    ),
    "train": LazyCommand("tensafe_client.cli.train:train", "Fine-tune a model."),
    "sample": LazyCommand(
        "tensafe_client.cli.sample:sample", "Generate text from a run, an artifact or a model."
    ),
    "runs": LazyCommand("tensafe_client.cli.runs:runs", "List, show, watch and delete runs."),
    "artifacts": LazyCommand(
        "tensafe_client.cli.artifacts:artifacts", "List, show and download saved checkpoints."
    ),
    "datasets": LazyCommand(
        "tensafe_client.cli.datasets:datasets", "Upload, list and delete datasets."
    ),
    "privacy": LazyCommand(
        "tensafe_client.cli.privacy:privacy", "Report what private runs have released."
    ),
    "models": LazyCommand("tensafe_client.cli.models:models", "List and show base models."),
    "operations": LazyCommand(
        "tensafe_client.cli.operations:operations", "List, show and cancel operations."
    ),
    "admin": LazyCommand("tensafe_client.cli.admin:admin", "Manage tenants and keys, verify runs."),
    "profiles": LazyCommand(
        "tensafe_client.cli.profiles:profiles", "List the services you use and pick the default."
    ),
}


class Root(LazyGroup):
    """The group `tensafe`; it turns errors of the SDK into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TenSafeError as error:
            raise ServiceFailure(error) from error
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    try:
        click.echo(f"tensafe {version('tensafe')}")
    except PackageNotFoundError:
        click.echo("tensafe (not installed: run from its source)")
    ctx.exit()


@examples(
    "tensafe up --backend torch --model smollm2-135m      start a service here",
    "tensafe train sft data.jsonl --steps 100             train on your own data",
    "tensafe runs watch RUN                               follow a run's loss",
    "tensafe artifacts download ARTIFACT ./adapter        get what plain peft loads",
)
@click.group(
    cls=Root, lazy_commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--target",
    metavar="HOST:PORT",
    help="Service to talk to; grpcs://HOST:PORT for TLS. [env: TENSAFE_TARGET]",
)
@click.option("--api-key", metavar="KEY", help="Key to present. [env: TENSAFE_API_KEY]")
@click.option("--profile", metavar="NAME", help="Profile to take them from. [env: TENSAFE_PROFILE]")
@click.option(
    "--ca",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PEM file of the authority that signed the service's certificate. [env: TENSAFE_CA]",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_context
def main(
    ctx: click.Context,
    target: str | None,
    api_key: str | None,
    profile: str | None,
    ca: Path | None,
) -> None:
    """TenSafe: LoRA fine-tuning as a service, on your own machines.

    `tensafe up` starts a service and writes a profile, from which the other commands know where it
    is. Commands that print take --json.
    """
    ctx.obj = Connection(target=target, api_key=api_key, profile=profile, ca=ca)
