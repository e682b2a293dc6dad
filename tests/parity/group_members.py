"""Runs of every kind, and a call of each, as hypothesis makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
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
    """

    seed: int
    lora: dict[str, Any]
    optimizer: dict[str, Any]
    reduction: Reduction
    lengths: tuple[int, ...]
    scored: float

    def request(self, call: int = 0) -> LossRequest:
        """Its `call`-th batch: other tokens and weights each time."""
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


MEMBERS = st.builds(
    Member,
    seed=st.integers(0, 2**31),
    lora=st.fixed_dictionaries(
        {
            "rank": st.integers(1, 64),
            "alpha": st.sampled_from([1.0, 8.0, 16.0, 50.0]),
            "dropout": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "target_modules": st.sets(st.sampled_from(GATED), min_size=1).map(
                lambda names: tuple(sorted(names))
            ),
        }
    ),
    optimizer=st.sampled_from(OPTIMIZERS),
    reduction=st.sampled_from(Reduction),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    scored=st.floats(0.05, 1.0),
)


def groups(count: int) -> st.SearchStrategy[list[Member]]:
    """So many members."""
    return st.lists(MEMBERS, min_size=count, max_size=count)


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
