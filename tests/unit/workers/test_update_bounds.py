"""What `bounds` says an update cannot exceed, against what torch's kernels do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workers.engine import optimizers
from workers.engine.bounds import Bounds, after
from workers.engine.magnitudes import l2_norms
from workers.engine.optimizers import RunOptimizer, Update, step
from workers.operations import OptimizerSettings

ADAM = ("adam", "adamw")
SIZES = st.one_of(
    st.just(0.0),
    st.floats(-44, 38.5).map(lambda power: 10.0**power),
    st.sampled_from([1e-170, 1e170]),
)


@dataclass
class Case:
    options: OptimizerSettings
    weights: float
    steps: list[tuple[float, float, float]]


@st.composite
def cases(draw) -> Case:
    """Options as a client may send them and beyond; a few steps of any size."""
    name = draw(st.sampled_from([*ADAM, "sgd"]))
    if name == "sgd":
        own = {"momentum": draw(st.sampled_from([None, 0.5, 0.999])), "beta1": None}
        options = OptimizerSettings(name=name, beta2=None, eps=None, **own)
    else:
        options = OptimizerSettings(
            name=name,
            beta1=draw(st.sampled_from([0.0, 0.9, 0.999999])),
            beta2=draw(st.sampled_from([0.0, 0.5, 0.999, 0.9999999])),
            eps=draw(st.sampled_from([1e-30, 1e-8, 1.0])),
        )
    rates = st.one_of(st.sampled_from([0.0, 1e-4, 1.0]), SIZES)
    steps = st.lists(st.tuples(SIZES, rates, rates), min_size=1, max_size=5)
    return Case(options, draw(SIZES), draw(steps))


@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=300, deadline=None)
def test_what_is_applied_is_finite_and_within_its_bounds(case, dtype):
    signs = torch.tensor([1.0, -1.0, 0.5, -1e-3, 0.0, 1.0], dtype=dtype)
    weights = nn.Parameter((signs * case.weights).nan_to_num())
    optimizer = RunOptimizer(case.options, weights)
    for at, (size, rate, decay) in enumerate(case.steps):
        gradient = (signs.roll(at) * size).nan_to_num()
        (norm,) = l2_norms([gradient])
        state = {name: value.clone() for name, value in optimizer.state().items()}
        before = weights.detach().clone()
        (applied,) = step([Update(optimizer, gradient, norm, rate, decay)])
        if not applied:
            assert torch.equal(weights, before)
            assert optimizer.state().keys() == state.keys()
            assert all(torch.equal(optimizer.state()[name], value) for name, value in state.items())
            continue
        bounds = optimizer.bounds
        assert bounds is not None
        now = optimizer.state()
        first = now.get("exp_avg", now.get("momentum_buffer"))
        found = [weights.detach(), first, now.get("exp_avg_sq")]
        for value, most in zip(found, (bounds.weights, bounds.first, bounds.second), strict=True):
            if value is not None:
                assert torch.isfinite(value).all()
                assert float(value.abs().max()) <= most * (1 + 1e-5)


@pytest.mark.parametrize("name", [*ADAM, "sgd"])
def test_an_ordinary_run_is_never_refused(name):
    """Bounds widen with each update; with decay in the gradient fast. The numbers do not."""
    own = (
        {"momentum": 0.99, "beta1": None, "beta2": None, "eps": None}
        if name == "sgd"
        else {"eps": 1e-12}
    )
    weights = nn.Parameter(torch.ones(64))
    optimizer = RunOptimizer(OptimizerSettings(name=name, **own), weights)
    looked_at = []
    for at in range(2000):
        gradient = torch.sin(torch.arange(64) + at)
        norm = float(torch.linalg.vector_norm(gradient))
        before = optimizer._bounds
        assert step([Update(optimizer, gradient, norm, 1e-2, 0.1)]) == [True]
        looked_at.append(before is not None and optimizer.bounds.weights < before.weights)
    assert any(looked_at) == (name == "adam")
    assert float(weights.detach().abs().max()) < 100


def test_weights_that_somebody_else_changed_are_looked_at_again():
    weights = nn.Parameter(torch.ones(4))
    optimizer = RunOptimizer(
        OptimizerSettings(name="sgd", beta1=None, beta2=None, eps=None), weights
    )
    small = Update(optimizer, torch.ones(4), 2.0, 1e-2, 0.0)
    assert step([small]) == [True]
    with torch.no_grad():
        weights.mul_(1e37)
    before = weights.detach().clone()
    assert step([small]) == [False]
    assert torch.equal(weights, before)
    with torch.no_grad():
        weights.mul_(1e-37)
    assert step([small]) == [True]
    assert optimizer.bounds.weights < 3


def test_epsilon_that_is_zero_in_the_weights_type_is_refused():
    for eps, dtype, applied in [
        (1e-40, torch.float32, False),
        (1e-40, torch.float64, True),
        (1e-30, torch.float32, True),
    ]:
        weights = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = RunOptimizer(OptimizerSettings(eps=eps), weights)
        gradient = torch.full((4,), 1e-30, dtype=dtype)
        norm = 2e-30
        assert step([Update(optimizer, gradient, norm, 1e-4, 0.01)]) == [applied]
        assert math.isfinite(float(weights.detach().sum()))


SGD = OptimizerSettings(name="sgd", beta1=None, beta2=None, eps=None, momentum=0.9)
ADAMS = [OptimizerSettings(name=name, eps=1e-30) for name in ADAM]
ALL = [*ADAMS, SGD]


@pytest.mark.parametrize(
    ("settings", "before", "gradient", "rate", "decay"),
    [
        *((own, Bounds(1.0), 0.0, 1e39, 0.0) for own in ALL),
        *((own, Bounds(0.0), 1.0, 1e-10, 1e39) for own in ALL),
        *((own, Bounds(1.0, first=1e10), 0.0, 1e-30, 0.0) for own in ADAMS),
        *((own, Bounds(1.0, first=1e30), 0.0, 1e10, 0.0) for own in ALL),
        *((own, Bounds(1.0), 1e20, 1e-40, 0.0) for own in ADAMS),
        *((own, Bounds(1.0, second=1e37), 0.0, 1e-40, 0.0) for own in ADAMS),
        (ADAMS[1], Bounds(0.0), 0.0, 1e20, 1e20),
        (SGD, Bounds(1e30), 0.0, 1e-20, 1e20),
    ],
)
def test_a_number_on_the_way_may_be_what_is_too_large(settings, before, gradient, rate, decay):
    numbers = {"gradient": gradient, "rate": rate, "decay": decay}
    assert after(before, settings, torch.float32, **numbers) is None
    assert after(before, settings, torch.float64, **numbers) is not None


@pytest.mark.parametrize("other", [{"beta1": 0.5}, {"beta2": 0.9}, {"eps": 1e-3}, {"name": "adam"}])
@pytest.mark.parametrize("apart", ["options", "rate", "decay"])
def test_runs_that_step_together_keep_their_own_options(other, apart):
    mine = OptimizerSettings()
    theirs = replace(mine, **other) if apart == "options" else mine
    rates = (1e-2, 3e-2) if apart == "rate" else (1e-2, 1e-2)
    decays = (0.1, 0.3) if apart == "decay" else (0.1, 0.1)
    assert_together_as_alone([mine, theirs], rates, decays)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_so_do_those_with_momentum(momentum):
    assert_together_as_alone([SGD, replace(SGD, momentum=momentum)], (1e-2, 1e-2), (0.0, 0.0))


def assert_together_as_alone(options, rates, decays) -> None:
    found = []
    for together in (True, False):
        optimizers = [RunOptimizer(own, nn.Parameter(torch.ones(5))) for own in options]
        for at in range(3):
            gradient = torch.sin(torch.arange(5.0) + at)
            own = [
                Update(optimizer, gradient, float(gradient.norm()), rate, decay)
                for optimizer, rate, decay in zip(optimizers, rates, decays, strict=True)
            ]
            for several in [own] if together else [[each] for each in own]:
                assert all(step(several))
        found.append([optimizer.weights.detach() for optimizer in optimizers])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not torch.equal(*found[0])


def test_numbers_are_looked_at_once_and_of_all_runs_together(monkeypatch):
    looks = []

    def count(vectors) -> list[float]:
        looks.append(len(vectors))
        return l2_norms(vectors)

    monkeypatch.setattr(optimizers, "l2_norms", count)
    own = [RunOptimizer(OptimizerSettings(), nn.Parameter(torch.ones(5))) for _ in range(3)]
    steps = [Update(each, torch.ones(5), 5**0.5, 1e-3, 0.01) for each in own]
    for _ in range(50):
        assert step(steps) == [True] * 3
    assert looks == [3]
    own[1].restore(own[0].state())
    assert step(steps) == [True] * 3
    assert looks == [3, 3]


def test_moments_that_were_restored_are_looked_at():
    optimizer = RunOptimizer(OptimizerSettings(), nn.Parameter(torch.ones(4)))
    small = Update(optimizer, torch.ones(4), 2.0, 1e-2, 0.0)
    assert step([small]) == [True]
    before = optimizer.weights.detach().clone()
    optimizer.restore(optimizer.state() | {"exp_avg": torch.full((4,), 1e35)})
    assert step([small]) == [False]
    assert torch.equal(optimizer.weights, before)
