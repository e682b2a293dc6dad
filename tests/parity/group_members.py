"""Runs of every kind, and a call of each, from seeds that hypothesis draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from parity.loss_calls import loss_request
from parity.tiny_models import GATED
from parity.tiny_runs import VOCABULARY, metric, perturb, settings

from workers.engine.base_model import BaseModel
from workers.engine.engine import TorchBackend
from workers.engine.run import Run
from workers.operations import Batch, LossOutcome, LossRequest, Reduction, StepRequest

SGD = {"name": "sgd", "beta1": None, "beta2": None, "eps": None, "momentum": 0.9}
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"name": "adam", "eps": 1e-6},
    SGD,
    {"grad_clip_norm": 0.1},
    {"learning_rate": 1e-3, "grad_clip_norm": 1.0},
    {"beta1": 0.5, "beta2": 0.9, "weight_decay": 0.3},
]


@dataclass(frozen=True, slots=True)
class Member:
    """A run and what it asks for.

    Attributes:
        seed: of the run, its perturbed adapter, its tokens and their weights.
        scored: share of the positions that are scored, about.
        loss: one of `loss_calls.LOSSES`, which has its own weights and reduction; None for
            cross-entropy with these.
    """

    seed: int
    lora: dict[str, Any]
    optimizer: dict[str, Any]
    reduction: Reduction
    lengths: tuple[int, ...]
    scored: float
    loss: str | None = None

    def request(self, call: int = 0) -> LossRequest:
        """Its `call`-th batch: other tokens and weights each time."""
        if self.loss is not None:
            return loss_request(self.loss, self.seed + call, lengths=self.lengths)
        rng = np.random.default_rng([self.seed, call])
        count = sum(self.lengths)
        weights = rng.choice([0.25, 1.0, 1.5], count) * (rng.random(count) < self.scored)
        weights[rng.integers(count)] = 1.0
        if self.reduction is Reduction.SUM:
            weights *= rng.choice([-0.5, 1.0], count)
        tokens, targets = rng.integers(3, VOCABULARY, (2, count)).astype(np.int32)
        offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
        batch = Batch(offsets, tokens, targets, weights.astype(np.float32))
        return LossRequest(batch, reduction=self.reduction)


def drawn(rng: np.random.Generator, loss: str | None = None) -> Member:
    """A member of any kind, with that loss."""
    names = rng.choice(GATED, rng.integers(1, len(GATED) + 1), replace=False)
    rows = int(rng.integers(1, 4))
    if loss is not None and loss.startswith("dpo"):
        rows = 2 * int(rng.integers(1, 3))  # pairs
    return Member(
        seed=int(rng.integers(2**31)),
        lora={
            "rank": int(rng.integers(1, 65)),
            "alpha": float(rng.choice([1.0, 8.0, 16.0, 50.0])),
            "dropout": float(rng.choice([0.0, 0.0, 0.1, 0.5])),
            "target_modules": tuple(sorted(names.tolist())),
        },
        optimizer=OPTIMIZERS[rng.integers(len(OPTIMIZERS))],
        reduction=list(Reduction)[rng.integers(len(Reduction))],
        lengths=tuple(rng.integers(1, 41, rows).tolist()),
        scored=float(rng.uniform(0.05, 1.0)),
        loss=loss,
    )


# From seeds: what hypothesis draws part by part is often one member many times over.
_SEEDS = st.integers(0, 2**32 - 1)
MEMBERS = _SEEDS.map(lambda seed: drawn(np.random.default_rng(seed)))


def groups(count: int, losses: Sequence[str] = ()) -> st.SearchStrategy[list[Member]]:
    """So many members, of which every other one has one of the losses, if there are any."""

    def group(seed: int) -> list[Member]:
        rng = np.random.default_rng(seed)
        own = [str(rng.choice(losses)) if losses and place % 2 else None for place in range(count)]
        return [drawn(rng, loss) for loss in rng.permutation(np.array(own, object))]

    return _SEEDS.map(group)


def open_all(
    base: BaseModel, members: Sequence[Member], token_budget: int = 100_000
) -> TorchBackend:
    """A backend with a run for each member, named by its index; no adapter is zero."""
    backend = TorchBackend([base], token_budget=token_budget)
    for index, member in enumerate(members):
        options = settings(seed=member.seed, lora=member.lora, optimizer=member.optimizer)
        backend.open_run(str(index), options, None)
        perturb(backend, str(index), member.seed)
    return backend


def runs(backend: TorchBackend, members: Sequence[Member]) -> dict[str, Run]:
    """Name → run, of every member."""
    return {str(index): backend._runs[str(index)] for index in range(len(members))}


def entries(
    members: Sequence[Member], indices: Sequence[int] | None = None, call: int = 0
) -> list[tuple[str, int, LossRequest]]:
    """What `forward_backward_group` takes."""
    chosen = range(len(members)) if indices is None else indices
    return [(str(index), 1, members[index].request(call)) for index in chosen]


def bits(backend: TorchBackend, outcomes: Sequence[object], runs: Sequence[str]) -> list[object]:
    """All that a call and the update after it leave behind, for comparison."""
    found: list[object] = []
    for run, outcome in zip(runs, outcomes, strict=True):
        assert isinstance(outcome, LossOutcome)
        own = backend._runs[run]
        found += [metric(outcome, "loss"), metric(outcome, "grad_norm")]
        found += [outcome.logprobs.tobytes(), own.accumulator.numpy().tobytes()]
        found.append(backend.optim_step(run, StepRequest()).grad_norm)
        found.append(own.adapter.weights.detach().numpy().tobytes())
    return found
