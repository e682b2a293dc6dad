"""What SmolLM2 learns from the docstrings of Python's library, with privacy and without.

All of it goes through the service: the dataset is uploaded, the server draws each batch of the
private run, and the other run gets shuffled batches of the same size from the client. Both are
judged in a third run, without `dp_config`, on modules that neither has seen: those are public.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_service import local_service

from tensafe_client import Datum, PrivacyReport, ServiceClient, TrainingClient
from tensafe_client.cli.train.sft_loop import mean_loss
from tensafe_client.data import DataLoader, docstring_pairs, split_by_module
from tensafe_client.data.chat import ChatTokenizer

_EVAL_BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """Both runs' recipe.

    Attributes:
        batch_size: units of a step; expected with privacy, exact without.
        max_grad_norm: C, of the private run.
        target_epsilon: ε of the private run at `delta`; σ follows.
        eval_every: updates between two evaluations.
    """

    model: str
    steps: int = 40
    batch_size: int = 48
    learning_rate: float = 2e-3
    rank: int = 4
    max_grad_norm: float = 1.0
    target_epsilon: float = 8.0
    delta: float = 1e-5
    eval_every: int = 10
    seed: int = 0


@dataclass
class Curve:
    """Held-out losses: mean of the scored tokens, by applied updates; ε of the updates so far."""

    losses: dict[int, float] = field(default_factory=dict)
    epsilons: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Compared:
    """Both runs' curves, and the private one's report."""

    private: Curve
    plain: Curve
    report: PrivacyReport
    train_examples: int
    held_out_examples: int


def train(recipe: Recipe, say: Callable[[str], None]) -> Compared:
    """Trains both runs in a service of their own."""
    with (
        local_service(backend="torch", models=[recipe.model]) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        tokenizer = ChatTokenizer(client.tokenizer_files(recipe.model))
        pairs = split_by_module(docstring_pairs())
        train, held_out = ([tokenizer.datum(pair.example()) for pair in part] for part in pairs)
        say(f"{len(train)} docstrings to learn, {len(held_out)} held out by module")
        dataset = client.upload_dataset(train, name="docstrings")
        judge = _Judge(client, recipe, held_out)
        dp = {
            "sampling": "server_poisson",
            "dataset_id": dataset.id,
            "expected_batch_size": float(recipe.batch_size),
            "max_grad_norm": recipe.max_grad_norm,
            "target_epsilon": recipe.target_epsilon,
            "target_delta": recipe.delta,
        }
        private = client.create_training_client(_config(recipe) | {"dp_config": dp})
        sigma = private.config.dp_config.noise_multiplier
        say(f"with privacy, noise multiplier {sigma:.4f}")
        found = _follow(private, judge, recipe, _private_steps(private), say)
        report = client.privacy_report(private.run_id)
        plain = client.create_training_client(_config(recipe))
        say("without privacy")
        without = _follow(plain, judge, recipe, _plain_steps(plain, train, recipe), say)
        return Compared(found, without, report, len(train), len(held_out))


def ratios(compared: Compared) -> dict[str, float]:
    """What was learned: losses before and after, and how much of the fall privacy leaves."""
    private, plain = (list(one.losses.values()) for one in (compared.private, compared.plain))
    return {
        "held-out loss before": private[0],
        "after, with privacy": private[-1],
        "after, without": plain[-1],
        "fall with privacy / fall without": (private[0] - private[-1]) / (plain[0] - plain[-1]),
        "epsilon": compared.report.epsilon,
    }


def plot(path: Path, compared: Compared, recipe: Recipe) -> None:
    """Draws both curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tensafe"
    from matplotlib import pyplot

    report = compared.report
    named = f"ε = {report.epsilon:.2f} at δ = {report.delta:g}"
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for curve, label in ((compared.private, named), (compared.plain, "without privacy")):
        axes.plot(list(curve.losses), list(curve.losses.values()), marker="o", label=label)
    axes.set(xlabel=f"updates of {recipe.batch_size} docstrings", ylabel="held-out loss per token")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


class _Judge:
    """A run without `dp_config`: a private run tells no loss, not even of other data."""

    def __init__(self, client: ServiceClient, recipe: Recipe, held_out: Sequence[Datum]) -> None:
        self._run = client.create_training_client(_config(recipe))
        self._batches = [
            held_out[begin : begin + _EVAL_BATCH] for begin in range(0, len(held_out), _EVAL_BATCH)
        ]

    def loss(self, run: TrainingClient) -> float:
        """Mean loss of the held-out examples' scored tokens at the run's present weights."""
        self._run.load_state(run.save_state().artifact_id)
        futures = [self._run.forward(batch) for batch in self._batches]
        return mean_loss([future.result() for future in futures])[0]


def _config(recipe: Recipe) -> dict[str, Any]:
    return {
        "model_ref": recipe.model,
        "lora_config": {"rank": recipe.rank, "alpha": 2.0 * recipe.rank, "dropout": 0.0},
        "optimizer": {"learning_rate": recipe.learning_rate, "weight_decay": 0.0},
        "batch_size": recipe.batch_size,
        "max_steps": recipe.steps,
        "seed": recipe.seed,
    }


Steps = Callable[[int], dict[int, float]]
"""Makes so many updates; ε after each, by the update's number; nothing without privacy."""


def _follow(
    run: TrainingClient,
    judge: _Judge,
    recipe: Recipe,
    steps: Steps,
    say: Callable[[str], None],
) -> Curve:
    curve = Curve({0: judge.loss(run)})
    say(f"held-out loss {curve.losses[0]:.4f} before")
    while run.step < recipe.steps:
        begin = time.perf_counter()
        curve.epsilons |= steps(min(recipe.eval_every, recipe.steps - run.step))
        curve.seconds += time.perf_counter() - begin
        curve.losses[run.step] = judge.loss(run)
        spent = f", ε {curve.epsilons[run.step]:.3f}" if curve.epsilons else ""
        say(f"{run.step:>4} updates, {curve.seconds:4.0f} s: {curve.losses[run.step]:.4f}{spent}")
    return curve


def _private_steps(run: TrainingClient) -> Steps:
    def steps(count: int) -> dict[int, float]:
        made = run.train_private(count)
        return {one.step: one.dp.total_epsilon for one in made if one.dp is not None}

    return steps


def _plain_steps(run: TrainingClient, examples: Sequence[Datum], recipe: Recipe) -> Steps:
    loader = DataLoader(examples, batch_size=recipe.batch_size, epochs=None, seed=recipe.seed)
    batches = iter(loader)

    def steps(count: int) -> dict[int, float]:
        for _ in range(count):
            # Each example's own token mean, as in the private run.
            run.forward_backward(next(batches), reduction="sequence_mean")
            run.optim_step().result()
        return {}

    return steps
