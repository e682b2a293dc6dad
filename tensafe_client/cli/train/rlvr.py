"""`tensafe train rlvr`: reinforcement learning with verifiable rewards from the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tensafe_client import ArtifactInfo, ServiceClient
from tensafe_client.cli.connecting import connect
from tensafe_client.cli.failures import INTERRUPTED
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_line
from tensafe_client.cli.train.run_options import (
    NewRun,
    resume_command,
    run_options,
    tokenizer_of,
)
from tensafe_client.cli.train.stopping import stopping_on_signals
from tensafe_client.cli.train.tasks import Tasks, read_tasks
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import TenSafeError
from tensafe_client.rlvr import (
    Evaluation,
    IterationReport,
    RLVRConfig,
    RLVRTrainer,
    warm_up,
)
from tensafe_client.rlvr.algorithms import ALGORITHMS
from tensafe_client.rlvr.state import is_checkpoint, seed_of
from tensafe_client.training import TrainingClient

_REPEATED_ON_RESUME = (
    *("reward", "reward_options", "eval_data", "task_seed", "algorithm", "iterations", "prompts"),
    *("group_size", "max_tokens", "temperature", "kl_coef", "learning_rate", "eval_every"),
    *("eval_problems", "checkpoint_every", "settings"),
)


@examples(
    "tensafe train rlvr chain-sum --model smollm2-135m --warm-up 8 --max-tokens 4 --lr 2e-4",
    "tensafe train rlvr gym:leg_counting --model MODEL --algorithm rloo --eval-every 10",
    "tensafe train rlvr problems.jsonl --model MODEL --reward numeric_match",
    "tensafe train rlvr chain-sum --model MODEL --set clip_high=1.28 --set inner_epochs=2",
    "tensafe train rlvr chain-sum --resume RUN --iterations 200",
)
@click.command()
@click.argument("task")
@run_options
@click.option("--reward", metavar="NAME", help="Reward for a file of problems.")
@click.option("--reward-options", metavar="JSON", help="The reward's options.")
@click.option(
    "--eval-data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Held-out problems, JSONL; generated tasks hold out by themselves.",
)
@click.option(
    "--task-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which problems are generated.",
)
@click.option(
    "--algorithm",
    type=click.Choice(list(ALGORITHMS)),
    default="grpo",
    show_default=True,
    help="How rewards become updates.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Batches of rollouts at the end; a resumed run's earlier ones count.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Problems of a batch.",
)
@click.option(
    "--group-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Completions of each problem.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Longest completion.",
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the sampling.")
@click.option(
    "--kl-coef",
    type=float,
    help="Weight of the KL divergence from the base model; 0 only measures it. [default: neither]",
)
@click.option(
    "--warm-up",
    "warm_up_steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Supervised steps on right answers first: without a success there is no signal.",
)
@click.option(
    "--warm-up-lr",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Learning rate of those.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=1),
    help="Evaluate on held-out problems after every N iterations, before the first and after the "
    "last.",
)
@click.option(
    "--eval-problems",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How many, the first ones.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    help="Save after every N iterations too. [default: end]",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other field of RLVRConfig, its value as in TOML.",
)
@json_option
@click.pass_context
def rlvr(
    ctx: click.Context,
    /,
    task: str,
    model: str | None,
    learning_rate: float | None,
    resume: str | None,
    reward: str | None,
    reward_options: str | None,
    eval_data: Path | None,
    task_seed: int,
    warm_up_steps: int,
    warm_up_lr: float,
    eval_every: int | None,
    checkpoint_every: int | None,
    settings: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Reinforcement learning on TASK: `chain-sum`, `gym:NAME`, or a JSONL file of problems.

    \b
    chain-sum   one-digit sums and differences, with 0.2 for an integer and 1 for the right one
    gym:NAME    a task of reasoning-gym (pip install 'tensafe[tasks]')
    FILE        {"prompt": "…", "answer": "…"} on each line; --reward says how it is judged

    Rewards are computed on this machine. Ctrl-C finishes the iteration, saves, and says how to
    resume; a resumed run goes on from its last checkpoint.
    """
    of_run = {name: options.pop(name) for name in _OF_THE_RUN}
    seed = of_run["seed"]
    new_run = NewRun(model, learning_rate, of_run)
    new_run.check(resume)
    if resume is not None and warm_up_steps:
        raise click.UsageError("--warm-up is for a new run; leave it out to go on with one")
    _refuse_what_has_no_effect(ctx, eval_every, warm_up_steps)
    config = RLVRConfig.of(
        {
            **options,
            "learning_rate": learning_rate,
            "eval_every": eval_every or 0,
            "checkpoint_every": checkpoint_every or 0,
            **({} if seed is None else {"seed": seed}),
            **_parsed(settings, ctx.command.params),
        }
    )
    tasks = read_tasks(task, reward, reward_options, eval_data, task_seed)
    if eval_every and tasks.held_out is None:
        raise click.UsageError("--eval-every needs --eval-data for a file of problems")
    client = connect(ctx)
    if resume is None:
        checkpoint, run = None, new_run.create(client)
    else:
        artifact = _newest_checkpoint(client, resume)
        checkpoint, run = artifact.id, client.training_client(resume)
        config = dataclasses.replace(config, seed=seed_of(artifact.metadata))
    printer = _Printer(as_json, config.iterations)
    printer.notice(f"run {run.run_id}: {config.algorithm}, iterations to {config.iterations}")
    tokenizer = tokenizer_of(client, run.config.model_ref)
    if warm_up_steps:
        _warm_up(run, tasks, tokenizer, warm_up_steps, warm_up_lr, printer)
    again = resume_command(ctx, [task], run.run_id, _REPEATED_ON_RESUME)
    try:
        with stopping_on_signals(printer.notice) as stop:
            result = RLVRTrainer(
                run,
                tasks.training,
                config,
                held_out=tasks.held_out if eval_every else None,
                tokenizer=tokenizer,
                task=tasks.names,
                on_report=printer.report,
                on_evaluation=printer.evaluation,
            ).run(resume=checkpoint, stop=stop)
    except TenSafeError:
        printer.notice(
            f"The run {run.run_id} stays; to go on from its last checkpoint, if it has one:\n"
            f"  {again}"
        )
        raise
    printer.saved(result.artifact_id)
    if result.stopped:
        printer.notice(f"Saved {result.artifact_id}. To resume:\n  {again}")
        ctx.exit(INTERRUPTED)
    printer.notice(
        f"Done. Sample from it:  tensafe sample --artifact {result.artifact_id} --prompt …\n"
        f"Take it away:          tensafe artifacts download {result.artifact_id} ./adapter"
    )


_OF_THE_RUN = ("rank", "alpha", "dropout", "seed", "name", "deterministic")
_FIELDS = frozenset(field.name for field in dataclasses.fields(RLVRConfig))


class _Printer:
    """Lines for people, or NDJSON."""

    def __init__(self, as_json: bool, iterations: int) -> None:
        self._as_json, self._iterations = as_json, iterations

    def notice(self, text: str) -> None:
        click.echo(text, err=self._as_json)

    def report(self, report: IterationReport) -> None:
        if self._as_json:
            told = asdict(report) | {"tokens_per_second": report.tokens_per_second}
            print_line({"event": "iteration", **told})
            return
        failed = sum(report.failed_rewards.values())
        seen = report.problems + report.equal_problems
        click.echo(
            f"iteration {report.iteration}/{self._iterations}  "
            f"reward {report.reward_mean:.3f} ± {report.reward_std:.3f}  "
            f"passed {report.pass_rate:.2f}  length {report.response_tokens:.1f}  "
            f"entropy {report.entropy:.2f}  {report.tokens_per_second:.0f} tokens/s"
            + (f"  {failed} rewards failed" if failed else "")
            + (
                f"  {report.equal_problems} of {seen} problems dropped as equal"
                if report.equal_problems
                else ""
            )
            + ("" if report.updates else "  no update: nothing to learn from")
        )

    def evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        if self._as_json:
            print_line({"event": "eval", "iteration": iteration, **asdict(evaluation)})
            return
        click.echo(
            f"iteration {iteration}  held-out pass rate {evaluation.pass_rate:.3f} "
            f"({evaluation.problems} problems)"
        )

    def warmed_up(self, losses: Sequence[float]) -> None:
        if self._as_json:
            print_line({"event": "warm_up", "losses": list(losses)})
            return
        click.echo(f"warm-up: {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    def saved(self, artifact_id: str) -> None:
        if self._as_json:
            print_line({"event": "saved", "artifact_id": artifact_id})


def _warm_up(
    run: TrainingClient,
    tasks: Tasks,
    tokenizer: ChatTokenizer,
    steps: int,
    learning_rate: float,
    printer: _Printer,
) -> None:
    printer.warmed_up(
        warm_up(run, tasks.training, tokenizer, steps=steps, learning_rate=learning_rate)
    )


def _newest_checkpoint(client: ServiceClient, run_id: str) -> ArtifactInfo:
    for artifact in client.artifacts(run_id):
        if is_checkpoint(artifact.metadata):
            return artifact
    raise click.BadParameter(
        f"{run_id} has no checkpoint of `tensafe train rlvr`", param_hint="--resume"
    )


def _refuse_what_has_no_effect(
    ctx: click.Context, eval_every: int | None, warm_up_steps: int
) -> None:
    for name, has_effect, needs in (
        ("eval_data", eval_every, "--eval-every"),
        ("eval_problems", eval_every, "--eval-every"),
        ("warm_up_lr", warm_up_steps, "--warm-up"),
    ):
        if not has_effect and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} has no effect without {needs}")


def _parsed(settings: Sequence[str], parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    flags = {one.name: one.opts[0] for one in parameters if one.name in _FIELDS}
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise click.BadParameter(f"{setting!r} is not NAME=VALUE", param_hint="--set")
        if name in flags:
            raise click.UsageError(f"--set {name} has an option of its own: give {flags[name]}")
        if name in values:
            raise click.UsageError(f"--set {name} is given twice; give it once")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values
