"""What every training takes: options of a run to create, or a run to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from tensafe_client import ServiceClient
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import ConfigError, OperationCancelledError
from tensafe_client.training import TrainingClient

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--model", metavar="MODEL", help="Base model (`tensafe models list`)."),
    click.option(
        "--lr", "learning_rate", type=click.FloatRange(min=0), help="Learning rate. [default: 1e-4]"
    ),
    click.option("--rank", type=click.IntRange(min=1), help="LoRA rank. [default: 16]"),
    click.option("--alpha", type=float, help="LoRA alpha. [default: 32]"),
    click.option("--dropout", type=float, help="LoRA dropout. [default: 0.05]"),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Fixes initialisation, dropout, sampling and the data's order. [default: drawn]",
    ),
    click.option("--name", help="Name of the run, for people."),
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="Equal runs give equal bits, whoever else shares the worker; slower when others do.",
    ),
    click.option("--resume", metavar="RUN", help="Go on with this run."),
)
_LORA = ("rank", "alpha", "dropout")
_RECENT = 500
"""Operations among which are all that a command has on their way."""


def run_options(command: F) -> F:
    """Adds the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class NewRun:
    """A run to create.

    Attributes:
        options: what its configuration has beside; None where it was not given.
    """

    model: str | None
    learning_rate: float | None
    options: Mapping[str, Any]

    def check(self, resume: str | None) -> None:
        """Refuses what a resumed run has settled, and a new run without a model.

        Raises:
            click.UsageError: naming the options.
        """
        if resume is None:
            if self.model is None:
                raise click.UsageError("name the base model: --model MODEL (`tensafe models list`)")
            return
        given = {"model": self.model, **self.options}
        fixed = [name for name, value in given.items() if value is not None]
        if fixed:
            flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
            raise click.UsageError(f"{flags} cannot change in a run that is resumed; leave it out")

    def create(self, client: ServiceClient) -> TrainingClient:
        """Creates it."""
        given = {name: value for name, value in self.options.items() if value is not None}
        lora = {name: given.pop(name) for name in _LORA if name in given}
        config: dict[str, Any] = {"model_ref": self.model, **given}
        if lora:
            config["lora_config"] = lora
        if self.learning_rate is not None:
            config["optimizer"] = {"learning_rate": self.learning_rate}
        return client.create_training_client(config)


def attach(client: ServiceClient, run_id: str) -> TrainingClient:
    """Attaches to a run once what was sent to it before has ended: its step then says how far it
    is, also if whoever drove it was killed a moment ago."""
    run = client.training_client(run_id)
    recent = client.operations(run_id, limit=_RECENT)
    waiting = [one.id for one in recent if one.state in ("queued", "running")]
    if waiting:  # the newest is the first, and ends as the last
        with suppress(OperationCancelledError):
            client.future(waiting[0]).exception()
    run.refresh()
    return run


def tokenizer_of(client: ServiceClient, model_ref: str) -> ChatTokenizer:
    """A model's tokenizer, fetched from the service.

    Raises:
        ConfigError: if it has none.
    """
    files = client.tokenizer_files(model_ref)
    if "tokenizer.json" not in files:
        raise ConfigError.of(
            "model",
            f"{model_ref!r} has no tokenizer, and `tensafe train` needs one to read text",
            remedy="choose a model that has one, or start the service with one: "
            "`tensafe up --backend torch --model smollm2-135m`",
        )
    return ChatTokenizer(files)


def resume_command(
    ctx: click.Context, words: Sequence[str], run_id: str, repeated: Collection[str]
) -> str:
    """The command line that goes on with a run.

    Args:
        words: its arguments.
        repeated: parameters that the run does not remember.
    """
    line = ["tensafe"]
    for name in ("target", "profile"):  # not the key: it does not belong on a screen
        if value := ctx.find_root().params.get(name):
            line += [f"--{name}", value]
    line += ["train", ctx.command.name or "", *words, "--resume", run_id]
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name not in repeated or value in (None, (), parameter.default):
            continue
        values = value if parameter.multiple else [value]
        for one in values:
            line += [parameter.opts[0], str(one)]
    return shlex.join(line)
