"""`tensafe train private`: training with differential privacy from the command line."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.failures import INTERRUPTED
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_line
from tensafe_client.cli.train.run_options import NewRun, attach, resume_command, run_options
from tensafe_client.cli.train.stopping import stopping_on_signals
from tensafe_client.errors import DPBudgetExceededError, TenSafeError
from tensafe_client.private_training import PrivateSteps
from tensafe_client.results import OptimStepResult
from tensafe_client.training import TrainingClient

_STEPS = 100
_DP = {
    "epsilon": "target_epsilon",
    "delta": "target_delta",
    "noise_multiplier": "noise_multiplier",
    "max_grad_norm": "max_grad_norm",
    "unit": "privacy_unit",
    "accountant": "accountant_type",
    "loss_noise_multiplier": "loss_noise_multiplier",
}
"""Options → fields of `dp_config`."""
_POSITIVE = click.FloatRange(min=0, min_open=True)


@examples(
    "tensafe datasets upload data.jsonl --model smollm2-135m",
    "tensafe train private DATASET --model smollm2-135m --epsilon 8 --steps 40 --batch-size 48",
    "tensafe train private DATASET --model smollm2-135m --noise-multiplier 1 --steps 40",
    "tensafe train private DATASET --resume RUN",
)
@click.command()
@click.argument("dataset_id", metavar="DATASET")
@run_options
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Updates of the run at the end, for which the noise is computed. "
    f"[default: {_STEPS}, or what a resumed run was created for]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Examples per step, on average. [default: 8]"
)
@click.option("--epsilon", type=_POSITIVE, help="ε that the dataset's ledger may not pass.")
@click.option("--delta", type=_POSITIVE, help="δ at which ε is stated. [default: 1e-5]")
@click.option(
    "--noise-multiplier",
    type=_POSITIVE,
    help="Noise over C. [default: the least that --epsilon allows]",
)
@click.option("--max-grad-norm", type=_POSITIVE, help="Clipping bound C. [default: 1]")
@click.option(
    "--unit",
    type=click.Choice(["example", "unit_id"]),
    help="What is protected: an example, or all of one unit_id. [default: example]",
)
@click.option(
    "--accountant", type=click.Choice(["pld", "rdp"]), help="How ε adds up. [default: pld]"
)
@click.option(
    "--loss-noise-multiplier",
    type=_POSITIVE,
    help="Also tell a mean loss of each step, with so much noise; ε counts it.",
)
@json_option
@click.pass_context
def private(
    ctx: click.Context,
    /,
    dataset_id: str,
    model: str | None,
    learning_rate: float | None,
    steps: int | None,
    resume: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train with differential privacy on DATASET (`tensafe datasets upload`).

    The server draws each batch from DATASET: each example, or all of a unit_id, with one
    probability. What was released adds up in DATASET's own ledger, over all runs on it; a step that
    would pass --epsilon is refused, and changes nothing.

    Ctrl-C waits for the steps in flight, saves, and says how to resume.
    """
    new_run = NewRun(model, learning_rate, options)
    new_run.check(resume)
    client = connect(ctx)
    if resume is None:
        run = replace(new_run, options=_config(dataset_id, steps or _STEPS, options)).create(client)
    else:
        run = attach(client, resume)
        _check_resumed(run, dataset_id)
    total = steps or run.config.max_steps or _STEPS
    if run.step >= total:
        raise click.BadParameter(f"{run.run_id} has {run.step} steps already", param_hint="--steps")
    printer = _Printer(as_json, total)
    printer.begin(run)
    again = resume_command(ctx, [dataset_id], run.run_id, ("learning_rate", "steps"))
    made = PrivateSteps(run, total - run.step, learning_rate)
    with stopping_on_signals(printer.notice) as stop:
        try:
            with closing(iter(made)) as results:
                for result in results:
                    printer.step(result)
                    if stop.is_set():
                        break
        except DPBudgetExceededError:
            printer.saved(run.save_state().artifact_id)
            raise
        except TenSafeError:
            printer.notice(f"The run {run.run_id} stays; to go on:\n  {again}")
            raise
        saved = run.save_state()
    printer.saved(saved.artifact_id)
    printer.notice(client.privacy_report(run.run_id).headline)
    printer.notice(f"All of it:  tensafe privacy report {run.run_id}")
    if saved.step < total:
        printer.notice(f"To resume:\n  {again}")
        ctx.exit(INTERRUPTED)


def _config(dataset_id: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration."""
    dp = {"dataset_id": dataset_id, "sampling": "server_poisson"}
    dp |= {field: options[name] for name, field in _DP.items() if options[name] is not None}
    if "target_epsilon" not in dp and "noise_multiplier" not in dp:
        raise click.UsageError("say how private: --epsilon, or --noise-multiplier")
    rest = {name: value for name, value in options.items() if name not in _DP}
    return {**rest, "max_steps": steps, "dp_config": dp}


def _check_resumed(run: TrainingClient, dataset_id: str) -> None:
    dp = run.config.dp_config
    if dp is None or dp.sampling != "server_poisson":
        raise click.BadParameter(
            f"the server does not draw the batches of {run.run_id}", param_hint="--resume"
        )
    if dp.dataset_id != dataset_id:
        raise click.BadParameter(
            f"{run.run_id} draws from {dp.dataset_id}, not {dataset_id}", param_hint="DATASET"
        )


class _Printer:
    """Lines for people, or NDJSON."""

    def __init__(self, as_json: bool, total_steps: int) -> None:
        self._as_json, self._total_steps = as_json, total_steps

    def notice(self, text: str) -> None:
        click.echo(text, err=self._as_json)

    def begin(self, run: TrainingClient) -> None:
        dp = run.config.dp_config
        assert dp is not None, "a private run has a dp_config"
        told = {"noise_multiplier": dp.noise_multiplier, "sample_rate": dp.sample_rate}
        if self._as_json:
            begin = {"run_id": run.run_id, "step": run.step, "total_steps": self._total_steps}
            print_line({"event": "start", **begin, **told})
            return
        click.echo(
            f"run {run.run_id}: steps {run.step + 1} to {self._total_steps}, noise multiplier "
            f"{dp.noise_multiplier:.4g}, sample rate {dp.sample_rate:.4g}"
        )

    def step(self, result: OptimStepResult) -> None:
        dp = result.dp
        assert dp is not None, "a private step says what it cost"
        if self._as_json:
            print_line({"event": "step", "total_steps": self._total_steps, **asdict(result)})
            return
        loss = "" if dp.noised_loss is None else f"  noised loss {dp.noised_loss:.3f}"
        click.echo(
            f"step {result.step}/{self._total_steps}{loss}  grad_norm {result.grad_norm:.3f}  "
            f"ε {dp.total_epsilon:.4f} at δ = {dp.delta:g}"
        )

    def saved(self, artifact_id: str) -> None:
        if self._as_json:
            print_line({"event": "saved", "artifact_id": artifact_id})
            return
        click.echo(f"Saved {artifact_id}")
