"""`tensafe privacy`: what private runs have cost."""

from __future__ import annotations

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_json


@click.group()
def privacy() -> None:
    """Report what private runs have released."""


@examples("tensafe privacy report RUN", "tensafe privacy report RUN --json > report.json")
@privacy.command()
@click.argument("run_id", metavar="RUN")
@json_option
@click.pass_context
def report(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """Say what RUN and all others on its dataset have released, and what that is worth."""
    found = connect(ctx).privacy_report(run_id)
    if as_json:
        print_json(found)
    else:
        click.echo(str(found))
