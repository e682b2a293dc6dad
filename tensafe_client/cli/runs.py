"""`tensafe runs`: the tenant's runs."""

from __future__ import annotations

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import (
    json_option,
    print_fields,
    print_json,
    print_line,
    print_table,
)
from tensafe_client.cli.verifying import show_verification
from tensafe_client.results import StepMetrics


@click.group()
def runs() -> None:
    """List, show, watch, verify and delete runs."""


@examples("tensafe runs list", "tensafe runs list --all --json")
@runs.command("list")
@click.option("--all", "include_deleted", is_flag=True, help="Also deleted runs.")
@json_option
@click.pass_context
def list_(ctx: click.Context, include_deleted: bool, as_json: bool) -> None:
    """List the runs, newest first."""
    found = connect(ctx).runs(include_deleted=include_deleted)
    if as_json:
        print_json(found)
        return
    print_table(
        ("RUN", "STATUS", "STEP", "MODEL", "NAME", "CREATED"),
        [
            (run.id, run.status, run.step, run.config.model_ref, run.config.name, run.created_at)
            for run in found
        ],
    )


@examples("tensafe runs show RUN", "tensafe runs show RUN --json")
@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
@click.pass_context
def show(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """Show RUN and its whole configuration."""
    run = connect(ctx).run(run_id)
    if as_json:
        print_json(run)
        return
    config, lora = run.config, run.config.lora_config
    print_fields(
        [
            ("run", run.id),
            ("name", config.name),
            ("status", run.status),
            ("created", run.created_at),
            ("model", config.model_ref),
            ("step", run.step if config.max_steps is None else f"{run.step} of {config.max_steps}"),
            ("next seq", run.next_seq),
            ("newest snapshot", f"after seq {run.snapshot_seq}" if run.snapshot_seq else "none"),
            ("replay mismatches", run.replay_mismatches),
            ("seed", config.seed),
            ("batch size", config.batch_size),
            ("accumulation", config.gradient_accumulation_steps),
            ("optimizer", config.optimizer.name),
            ("learning rate", config.optimizer.learning_rate),
            ("weight decay", config.optimizer.weight_decay),
            ("clip to norm", config.optimizer.grad_clip_norm),
        ]
    )
    if lora is not None:
        print_fields(
            [
                ("LoRA rank", lora.rank),
                ("LoRA alpha", lora.alpha),
                ("LoRA dropout", lora.dropout),
                ("LoRA modules", lora.target_modules),
            ]
        )


@examples(
    "tensafe runs watch RUN                     from now on, until Ctrl-C",
    "tensafe runs watch RUN --since 0           from its first step",
    "tensafe runs watch RUN --since 0 --no-follow --json > steps.ndjson",
)
@runs.command()
@click.argument("run_id", metavar="RUN")
@click.option(
    "--since",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Only steps after this cursor, which --json prints with each step.",
)
@click.option(
    "--follow/--no-follow", default=True, help="Go on with new steps, or end with the last one."
)
@json_option
@click.pass_context
def watch(ctx: click.Context, run_id: str, since: int, follow: bool, as_json: bool) -> None:
    """Print RUN's metrics, step by step, as the service pushes them."""
    client = connect(ctx)
    for step in client.training_client(run_id).metrics(follow=follow, since=since):
        if as_json:
            print_line(step)
            continue
        if step.skipped:
            click.echo(f"… {step.skipped} steps left out: this command was read too slowly")
        click.echo(_line(step))


def _line(step: StepMetrics) -> str:
    return (
        f"step {step.step:>6}  loss {step.loss:8.4f}  grad_norm {step.grad_norm:8.3f}  "
        f"lr {step.learning_rate:.3g}  {step.tokens_per_second:8.0f} tokens/s  "
        f"queue {step.queue_ms:6.0f} ms  compute {step.compute_ms:6.0f} ms"
    )


@examples("tensafe runs verify RUN", "tensafe runs verify RUN --json > report.json")
@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
@click.pass_context
def verify(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """Replay RUN from its log on a worker, and say whether it gives the recorded results.

    The run itself is not touched. Exit status 0: it does; 11: it does not.
    """
    show_verification(ctx, connect(ctx).verify_run, run_id, as_json)


@examples("tensafe runs delete RUN")
@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
@click.pass_context
def delete(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """Delete RUN: what is queued is cancelled; its artifacts stay."""
    client = connect(ctx)
    client.delete_run(run_id)
    if as_json:
        print_json(client.run(run_id))
    else:
        click.echo(f"Deleted {run_id}. Its artifacts stay: tensafe artifacts list --run {run_id}")
