"""`tensafe operations`: what is queued, runs and has ended."""

from __future__ import annotations

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table


@click.group()
def operations() -> None:
    """List, show and cancel operations."""


@examples("tensafe operations list --run RUN")
@operations.command("list")
@click.option("--run", "run_id", metavar="RUN", help="Only those of this run.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many."
)
@json_option
@click.pass_context
def list_(ctx: click.Context, run_id: str | None, limit: int, as_json: bool) -> None:
    """List the operations, newest first."""
    found = connect(ctx).operations(run_id, limit=limit)
    if as_json:
        print_json(found)
        return
    print_table(
        ("OPERATION", "RUN", "SEQ", "KIND", "STATE", "QUEUE MS", "COMPUTE MS", "CREATED"),
        [
            (
                operation.id,
                operation.run_id,
                operation.seq,
                operation.kind,
                operation.state,
                f"{operation.queue_ms:.0f}",
                f"{operation.compute_ms:.0f}",
                operation.created_at,
            )
            for operation in found
        ],
    )


@examples("tensafe operations show OPERATION")
@operations.command()
@click.argument("operation_id", metavar="OPERATION")
@json_option
@click.pass_context
def show(ctx: click.Context, operation_id: str, as_json: bool) -> None:
    """Show OPERATION: its state, its times, and why it failed if it did."""
    operation = connect(ctx).operation(operation_id)
    if as_json:
        print_json(operation)
        return
    print_fields(
        [
            ("operation", operation.id),
            ("run", operation.run_id),
            ("seq", operation.seq),
            ("kind", operation.kind),
            ("state", operation.state),
            ("created", operation.created_at),
            ("finished", operation.finished_at),
            ("queue ms", operation.queue_ms),
            ("compute ms", operation.compute_ms),
            ("fingerprint", operation.fingerprint),
            ("error", operation.error),
        ]
    )


@examples("tensafe operations cancel OPERATION")
@operations.command()
@click.argument("operation_id", metavar="OPERATION")
@json_option
@click.pass_context
def cancel(ctx: click.Context, operation_id: str, as_json: bool) -> None:
    """Cancel OPERATION if it has not started; one that has runs to its end.

    A cancelled forward_backward poisons its accumulation window: the optim_step that closes it
    fails, and the next window starts clean.
    """
    client = connect(ctx)
    cancelled = client.cancel(operation_id)
    operation = client.operation(operation_id)
    if as_json:
        print_json({"cancelled": cancelled, "operation": operation})
    elif cancelled:
        how = "" if operation.kind == "sample" else " before it ran"
        click.echo(f"Cancelled {operation.id}{how}.")
    else:
        click.echo(f"Not cancelled: {operation.id} is {operation.state} already.")
