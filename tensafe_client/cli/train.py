"""`tensafe train`: fine-tuning from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from tensafe_client import ServiceClient, schedules
from tensafe_client.cli.connecting import connect
from tensafe_client.cli.dataset import STDLIB_DOCSTRINGS, encode_examples, read_examples
from tensafe_client.cli.failures import INTERRUPTED
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option
from tensafe_client.cli.progress import choose_progress
from tensafe_client.cli.sft_loop import SftLoop, stopping_on_signals
from tensafe_client.data import DataLoader, Datum
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import ConfigError, TenSafeError
from tensafe_client.schedules import Schedule
from tensafe_client.training import TrainingClient

_FIXED_BY_THE_RUN = (
    "model",
    "batch_size",
    "rank",
    "alpha",
    "dropout",
    "seed",
    "name",
    "deterministic",
)
_TOP = ("batch_size", "seed", "name", "deterministic")
_REPEATED_ON_RESUME = (
    *("steps", "learning_rate", "schedule", "warmup", "max_tokens"),
    *("eval_data", "eval_every", "eval_examples", "save_every"),
)


@click.group()
def train() -> None:
    """Fine-tune a model."""


@examples(
    "tensafe train sft data.jsonl --model smollm2-135m --steps 200",
    "tensafe train sft data.jsonl --model smollm2-135m --lr 1e-3 --schedule cosine --warmup 20",
    "tensafe train sft stdlib-docstrings --model smollm2-135m --steps 40 --eval-every 10",
    "tensafe train sft data.jsonl --resume RUN --steps 400",
)
@train.command()
@click.argument("data")
@click.option("--model", metavar="MODEL", help="Base model (`tensafe models list`).")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Applied updates of the run at the end; a resumed run's earlier ones count.",
)
@click.option(
    "--lr", "learning_rate", type=click.FloatRange(min=0), help="Learning rate. [default: 1e-4]"
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples per step. [default: 8]")
@click.option("--rank", type=click.IntRange(min=1), help="LoRA rank. [default: 16]")
@click.option("--alpha", type=float, help="LoRA alpha. [default: 32]")
@click.option("--dropout", type=float, help="LoRA dropout. [default: 0.05]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Fixes initialisation, dropout, sampling and the data's order. [default: drawn]",
)
@click.option("--name", help="Name of the run, for people.")
@click.option(
    "--deterministic",
    is_flag=True,
    default=None,
    help="Equal runs give equal bits, whoever else shares the worker; slower when others do.",
)
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
@click.option("--resume", metavar="RUN", help="Go on with this run.")
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
    given = {"model": model, "batch_size": batch_size, **options}
    _check(resume, given, eval_data, eval_every, data)
    shape = _schedule(schedule, steps, warmup)
    found = read_examples(data, eval_data)
    client = connect(ctx)
    attached = client.training_client(resume) if resume else None
    if attached is not None and attached.step >= steps:
        raise click.BadParameter(
            f"{attached.run_id} has {attached.step} steps already; name more to go on",
            param_hint="--steps",
        )
    # The whole data is encoded before a run is created: no bad line is met in the middle of one.
    model_ref = model if attached is None else attached.config.model_ref
    assert model_ref is not None, "_check asks for one"
    encode = partial(
        encode_examples,
        _tokenizer(client, model_ref),
        max_tokens=max_tokens,
        context_length=client.model(model_ref).context_length,
    )
    datums = encode(found.train, source=data)
    held_out = encode(
        found.held_out[:eval_examples] if eval_every else (), source=str(eval_data or data)
    )
    run = _create(client, given, learning_rate) if attached is None else attached
    rate = run.config.optimizer.learning_rate if learning_rate is None else learning_rate
    progress = choose_progress(as_json)
    again = _resume_command(ctx, run.run_id)
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


def _check(
    resume: str | None,
    given: dict[str, Any],
    eval_data: Path | None,
    eval_every: int | None,
    data: str,
) -> None:
    if resume:
        fixed = [name for name in _FIXED_BY_THE_RUN if given[name] is not None]
        if fixed:
            flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
            raise click.UsageError(f"{flags} cannot change in a run that is resumed; leave it out")
    elif given["model"] is None:
        raise click.UsageError("name the base model: --model MODEL (`tensafe models list`)")
    if eval_data is not None and eval_every is None:
        raise click.UsageError("--eval-data needs --eval-every")
    if eval_every is not None and eval_data is None and data != STDLIB_DOCSTRINGS:
        raise click.UsageError("--eval-every needs --eval-data")


def _tokenizer(client: ServiceClient, model_ref: str) -> ChatTokenizer:
    files = client.tokenizer_files(model_ref)
    if "tokenizer.json" not in files:
        raise ConfigError(
            f"model {model_ref!r} has no tokenizer, and `tensafe train sft` needs one to read text",
            remedy="choose a model that has one, or start the service with one: "
            "`tensafe up --backend torch --model smollm2-135m`",
        )
    return ChatTokenizer(files)


def _create(
    client: ServiceClient, given: dict[str, Any], learning_rate: float | None
) -> TrainingClient:
    lora = {name: given[name] for name in ("rank", "alpha", "dropout") if given[name] is not None}
    top = {name: given[name] for name in _TOP if given[name] is not None}
    config: dict[str, Any] = {"model_ref": given["model"], **top}
    if lora:
        config["lora_config"] = lora
    if learning_rate is not None:
        config["optimizer"] = {"learning_rate": learning_rate}
    return client.create_training_client(config)


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


def _resume_command(ctx: click.Context, run_id: str) -> str:
    """The command line that goes on with the run: what the run does not remember is repeated."""
    words = ["tensafe"]
    for name in ("target", "profile"):  # not the key: it does not belong on a screen
        if value := ctx.find_root().params.get(name):
            words += [f"--{name}", value]
    words += ["train", "sft", str(ctx.params["data"]), "--resume", run_id]
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name in _REPEATED_ON_RESUME and value not in (None, parameter.default):
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)
