"""`tensafe train sft`: supervised fine-tuning from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from tensafe_client import schedules
from tensafe_client.cli.connecting import connect
from tensafe_client.cli.failures import INTERRUPTED
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option
from tensafe_client.cli.train.dataset import STDLIB_DOCSTRINGS, encode_examples, read_examples
from tensafe_client.cli.train.progress import choose_progress
from tensafe_client.cli.train.run_options import (
    NewRun,
    attach,
    resume_command,
    run_options,
    tokenizer_of,
)
from tensafe_client.cli.train.sft_loop import SftLoop
from tensafe_client.cli.train.stopping import stopping_on_signals
from tensafe_client.data import DataLoader, Datum
from tensafe_client.errors import TenSafeError
from tensafe_client.schedules import Schedule
from tensafe_client.training import TrainingClient

_REPEATED_ON_RESUME = (
    *("steps", "learning_rate", "schedule", "warmup", "max_tokens"),
    *("eval_data", "eval_every", "eval_examples", "save_every"),
)


@examples(
    "tensafe train sft data.jsonl --model smollm2-135m --steps 200",
    "tensafe train sft data.jsonl --model smollm2-135m --lr 1e-3 --schedule cosine --warmup 20",
    "tensafe train sft stdlib-docstrings --model smollm2-135m --steps 40 --eval-every 10",
    "tensafe train sft data.jsonl --resume RUN --steps 400",
)
@click.command()
@click.argument("data")
@run_options
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Applied updates of the run at the end; a resumed run's earlier ones count.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples per step. [default: 8]")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="constant",
    show_default=True,
    help="How the learning rate goes down until the last step.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps over which the learning rate rises to its full value.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=2), help="Cut longer examples to so many tokens."
)
@click.option(
    "--eval-data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL to evaluate on; stdlib-docstrings holds modules out by itself.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=1),
    help="Evaluate after every N steps, before the first and after the last.",
)
@click.option(
    "--eval-examples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Evaluate on so many of the examples, the first ones.",
)
@click.option(
    "--save-every", type=click.IntRange(min=1), help="Save after every N steps too. [default: end]"
)
@json_option
@click.pass_context
def sft(
    ctx: click.Context,
    /,
    data: str,
    model: str | None,
    steps: int,
    learning_rate: float | None,
    batch_size: int | None,
    schedule: str,
    warmup: int,
    max_tokens: int | None,
    eval_data: Path | None,
    eval_every: int | None,
    eval_examples: int,
    save_every: int | None,
    resume: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Supervised fine-tuning on DATA, a JSONL file or the word `stdlib-docstrings`.

    \b
    Each line of the file is a JSON object with one of
      {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
      {"prompt": "…", "completion": "…"}
      {"text": "…"}
    Prompts are read and not learned; the model's chat template is applied to messages.

    Ctrl-C waits for the steps in flight, saves, and says how to resume. A resumed run goes on with
    its own weights, optimizer and place in the data.
    """
    new_run = NewRun(model, learning_rate, {"batch_size": batch_size, **options})
    new_run.check(resume)
    _check(data, eval_data, eval_every)
    shape = _schedule(schedule, steps, warmup)
    found = read_examples(data, eval_data)
    client = connect(ctx)
    attached = attach(client, resume) if resume else None
    if attached is not None and attached.step >= steps:
        raise click.BadParameter(
            f"{attached.run_id} has {attached.step} steps already; name more to go on",
            param_hint="--steps",
        )
    if attached is not None and steps > (most := attached.config.max_steps or steps):
        raise click.BadParameter(
            f"{attached.run_id} was made for {most} steps and takes no more", param_hint="--steps"
        )
    # The whole data is encoded before a run is created: no bad line is met in the middle of one.
    model_ref = model if attached is None else attached.config.model_ref
    assert model_ref is not None, "NewRun.check asks for one"
    encode = partial(
        encode_examples,
        tokenizer_of(client, model_ref),
        max_tokens=max_tokens,
        context_length=client.model(model_ref).context_length,
    )
    datums = encode(found.train, source=data)
    held_out = encode(
        found.held_out[:eval_examples] if eval_every else (), source=str(eval_data or data)
    )
    run = new_run.create(client) if attached is None else attached
    rate = run.config.optimizer.learning_rate if learning_rate is None else learning_rate
    progress = choose_progress(as_json)
    again = resume_command(ctx, [str(data)], run.run_id, _REPEATED_ON_RESUME)
    try:
        with stopping_on_signals(progress.on_notice) as stop:
            artifact_id = SftLoop(
                run=run,
                batches=iter(_loader(datums, run)),
                learning_rate=replace(shape, learning_rate=rate),
                total_steps=steps,
                stop=stop,
                progress=progress,
                held_out=_cut(held_out, run.config.batch_size),
                eval_every=eval_every or 0,
                save_every=save_every or 0,
            )()
    except TenSafeError:
        progress.on_notice(f"The run {run.run_id} stays; to go on:\n  {again}")
        raise
    if stop.is_set():
        progress.on_notice(f"Saved {artifact_id}. To resume:\n  {again}")
        ctx.exit(INTERRUPTED)
    progress.on_notice(
        f"Done. Sample from it:  tensafe sample --artifact {artifact_id} --prompt …\n"
        f"Take it away:          tensafe artifacts download {artifact_id} ./adapter"
    )


def _check(data: str, eval_data: Path | None, eval_every: int | None) -> None:
    if eval_data is not None and eval_every is None:
        raise click.UsageError("--eval-data needs --eval-every")
    if eval_every is not None and eval_data is None and data != STDLIB_DOCSTRINGS:
        raise click.UsageError("--eval-every needs --eval-data")


def _loader(datums: Sequence[Datum], run: TrainingClient) -> DataLoader[Datum]:
    return DataLoader(
        datums,
        batch_size=run.config.batch_size,
        epochs=None,
        seed=run.config.seed,
        start=run.step * run.config.gradient_accumulation_steps,
    )


def _schedule(kind: str, steps: int, warmup: int) -> Schedule:
    """The schedule with a full rate of 1: the run's own is known once the run is."""
    if kind == "constant":
        return schedules.constant(1.0, warmup_steps=warmup)
    if warmup >= steps:
        raise click.BadParameter(
            f"a warm-up of {warmup} steps leaves none for the {kind} schedule to go down; "
            f"it must be below --steps {steps}",
            param_hint="--warmup",
        )
    make = schedules.linear if kind == "linear" else schedules.cosine
    return make(1.0, total_steps=steps, warmup_steps=warmup)


def _cut(datums: Sequence[Datum], size: int) -> list[Sequence[Datum]]:
    return [datums[i : i + size] for i in range(0, len(datums), size)]
