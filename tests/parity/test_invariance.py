"""What must change nothing: padding, splitting, company, and how a batch is cut into calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.tiny_runs import metric, request_of, rows_of, settings

from tensafe.wire.status import TenSafeFault
from workers.engine import optimizers
from workers.engine.engine import TorchBackend
from workers.operations import Reduction, StepRequest


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_splitting_changes_only_rounding(base, dropout):
    rows = rows_of(3, [5, 14, 9, 12, 30])
    results = []
    for budget in (1, 40, 10_000):
        backend = TorchBackend([base], token_budget=budget)
        backend.open_run("run", settings(lora={"dropout": dropout}), None)
        # A step first, so that B is not zero and the masks matter.
        backend.forward_backward("run", 1, request_of(rows))
        backend.optim_step("run", StepRequest())
        outcome = backend.forward_backward("run", 3, request_of(rows))
        results.append((outcome, backend._runs["run"].accumulator.clone()))
        backend.close_run("run")
    for outcome, gradient in results[1:]:
        np.testing.assert_allclose(outcome.logprobs, results[0][0].logprobs, atol=5e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=2e-4, rtol=2e-3)


def test_dropout_depends_on_the_operation_and_the_seed_and_forward_has_none(base):
    backend = TorchBackend([base])
    rows = rows_of(3, [20, 20])
    request = request_of(rows)
    for name, seed in (("a", 1), ("twin", 1), ("b", 2)):
        backend.open_run(name, settings(seed=seed, lora={"dropout": 0.5}), None)
        with torch.no_grad():
            backend._runs[name].adapter.weights.copy_(
                0.1
                * torch.randn(
                    backend._runs[name].adapter.weights.shape,
                    generator=torch.Generator().manual_seed(0),
                )
            )
    first = {
        name: backend.forward_backward(name, 1, request).logprobs for name in ("a", "twin", "b")
    }
    second = backend.forward_backward("a", 2, request).logprobs
    np.testing.assert_array_equal(first["a"], first["twin"])
    assert not np.allclose(first["a"], first["b"])
    assert not np.allclose(first["a"], second)
    plain = backend.forward("a", request).logprobs
    np.testing.assert_array_equal(plain, backend.forward("b", request).logprobs)
    assert not np.allclose(plain, first["a"])


def test_calls_of_different_lengths_are_one_big_batch(base):
    rows = rows_of(8, [5, 21, 9, 12])
    whole, parts = TorchBackend([base]), TorchBackend([base])
    whole.open_run("whole", settings(), None)
    parts.open_run("parts", settings(accumulation_steps=2), None)
    whole.forward_backward("whole", 1, request_of(rows, masked=3))
    one = whole.optim_step("whole", StepRequest())
    first = parts.forward_backward("parts", 1, request_of(rows[:1], masked=3))
    between = parts.optim_step("parts", StepRequest())
    second = parts.forward_backward("parts", 3, request_of(rows[1:], masked=3))
    two = parts.optim_step("parts", StepRequest())
    assert (between.applied, between.step, between.grad_norm) == (False, 0, None)
    assert (two.applied, two.step) == (True, 1)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert metric(two, "loss") == pytest.approx(metric(one, "loss"), rel=1e-6)
    assert metric(two, "tokens") == 47
    weighted = (metric(first, "loss") * 2 + metric(second, "loss") * 33) / 35
    assert metric(two, "loss") == pytest.approx(weighted, rel=1e-5)
    ours, theirs = (b._runs[n].adapter.weights for b, n in ((parts, "parts"), (whole, "whole")))
    # Adam divides by the gradient's size, which magnifies rounding where it is near zero.
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - theirs).abs().mean() < 1e-6


def test_sum_reduction_divides_by_nothing_and_takes_negative_weights(base):
    backend = TorchBackend([base])
    backend.open_run(
        "run", settings(optimizer={"name": "sgd", "beta1": None, "beta2": None, "eps": None}), None
    )
    mean = request_of(rows_of(1, [9]), masked=0)
    summed = request_of(rows_of(1, [9]), masked=0, reduction=Reduction.SUM)
    a = backend.forward_backward("run", 1, mean)
    one = backend.optim_step("run", StepRequest(learning_rate=0.0))
    b = backend.forward_backward("run", 3, summed)
    two = backend.optim_step("run", StepRequest(learning_rate=0.0))
    assert metric(b, "loss") == pytest.approx(9 * metric(a, "loss"), rel=1e-6)
    assert metric(b, "grad_norm") == pytest.approx(9 * metric(a, "grad_norm"), rel=1e-5)
    assert two.grad_norm == pytest.approx(9 * one.grad_norm, rel=1e-5)
    summed.batch.weights = np.asarray([1, -1, 2, -2, 0, 0.5, -0.5, 1, -1], np.float32)
    outcome = backend.forward_backward("run", 5, summed)
    expected = -(outcome.logprobs * summed.batch.weights).sum()
    assert metric(outcome, "loss") == pytest.approx(expected, rel=1e-5)
    mean.batch.weights = summed.batch.weights
    with pytest.raises(TenSafeFault, match="negative"):
        backend.forward("run", mean)


def test_runs_do_not_feel_each_other(base):
    """Bit for bit, with other ranks and targets beside it, and a neighbour's bad batches."""
    request = request_of(rows_of(4, [9, 17]))

    def train(backend: TorchBackend, disturb) -> list[float]:
        curve = []
        for step in range(4):
            disturb(step)
            outcome = backend.forward_backward("mine", 2 * step + 1, request)
            curve.append(metric(outcome, "loss"))
            backend.optim_step("mine", StepRequest())
        return curve

    alone = TorchBackend([base])
    alone.open_run("mine", settings(lora={"dropout": 0.1}), None)
    expected = train(alone, lambda step: None)
    final = alone._runs["mine"].adapter.weights.detach().clone()
    alone.close_run("mine")

    shared = TorchBackend([base])
    shared.open_run("mine", settings(lora={"dropout": 0.1}), None)
    other = {"rank": 7, "target_modules": ("gate_proj", "q_proj"), "dropout": 0.5}

    def disturb(step: int) -> None:
        shared.open_run("other", settings(seed=9, lora=other), None)
        bad = request_of(rows_of(4, [9, 17]))
        bad.batch.input_tokens = bad.batch.input_tokens.copy()
        bad.batch.input_tokens[3] = 10**6
        with pytest.raises(TenSafeFault, match="1000000"):
            shared.forward_backward("other", 1, bad)
        with pytest.raises(TenSafeFault, match="forward_backward of this"):
            shared.optim_step("other", StepRequest())
        shared.forward_backward("other", 3, request)
        shared.optim_step("other", StepRequest(learning_rate=1e25))
        with pytest.raises(TenSafeFault, match="NaN or infinite"):
            shared.forward_backward("other", 5, request)
        if step % 2:
            shared.close_run("other")

    assert train(shared, disturb) == expected
    assert torch.equal(shared._runs["mine"].adapter.weights, final)


def test_forward_goes_through_its_own_runs_adapter(base):
    """Whichever run was at work before, of equal shape as of another."""
    backend = TorchBackend([base])
    request = request_of(rows_of(4, [9, 17]))
    options = {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 3, "lora": {"rank": 2}}}
    alone = {}
    for name, own in options.items():
        backend.open_run(name, settings(**own), None)
        backend.forward_backward(name, 1, request)
        backend.optim_step(name, StepRequest())
        alone[name] = backend.forward(name, request).logprobs
    assert not np.allclose(alone["a"], alone["b"])
    for name in ("a", "b", "a", "c", "b", "c", "a"):
        np.testing.assert_array_equal(backend.forward(name, request).logprobs, alone[name])


def test_a_refused_windows_gradient_is_gone(base):
    backend = TorchBackend([base])
    request = request_of(rows_of(4, [9, 17]))
    for name in ("run", "clean"):
        backend.open_run(name, settings(accumulation_steps=2), None)
    backend.forward_backward("run", 1, request_of(rows_of(5, [30])))
    assert not backend.optim_step("run", StepRequest()).applied
    backend.poison("run")
    with pytest.raises(TenSafeFault, match="forward_backward of this"):
        backend.optim_step("run", StepRequest())
    assert backend._runs["run"].accumulator is None
    outcomes = []
    for name in ("run", "clean"):
        backend.forward_backward(name, 5, request)
        assert not backend.optim_step(name, StepRequest()).applied
        backend.forward_backward(name, 7, request_of(rows_of(6, [12])))
        outcomes.append(backend.optim_step(name, StepRequest()))
    assert outcomes[0].applied
    assert outcomes[0].grad_norm == outcomes[1].grad_norm
    assert metric(outcomes[0], "loss") == metric(outcomes[1], "loss")
    weights = [backend._runs[name].adapter.weights for name in ("run", "clean")]
    assert torch.equal(*weights)


OVERFLOWS = {
    "learning rate": ({}, StepRequest(learning_rate=1e39)),
    "weight decay": ({}, StepRequest(weight_decay=1e300)),
    "eps": ({"eps": 1e-50}, StepRequest()),
    "sgd": (
        {"name": "sgd", "beta1": None, "beta2": None, "eps": None, "momentum": 0.9},
        StepRequest(learning_rate=1e39),
    ),
}


@pytest.mark.parametrize(
    ("case", "steps_before"),
    # A run whose own options overflow never makes a first step.
    [*((case, 0) for case in OVERFLOWS), *((case, 2) for case in OVERFLOWS if case != "eps")],
)
def test_an_update_that_overflows_is_not_applied(base, case, steps_before):
    """The weights and the optimizer's state stay as they were, bit for bit."""
    optimizer, wrecking = OVERFLOWS[case]
    backend = TorchBackend([base])
    request = request_of(rows_of(4, [9, 17]))
    for name in ("run", "twin"):
        backend.open_run(name, settings(optimizer=optimizer), None)

    def step(name: str) -> None:
        backend.forward_backward(name, 1, request)
        backend.optim_step(name, StepRequest())

    for _ in range(steps_before):
        step("run")
        step("twin")
    run, twin = (backend._runs[name] for name in ("run", "twin"))
    backend.forward_backward("run", 3, request)
    with pytest.raises(TenSafeFault, match="nothing was applied") as caught:
        backend.optim_step("run", wrecking)
    assert caught.value.detail.reason == "NON_FINITE_GRADIENT"
    assert "lower the learning rate" in str(caught.value)
    assert run.window.step == steps_before
    assert run.accumulator is None
    assert torch.equal(run.adapter.weights, twin.adapter.weights)
    ours, theirs = run.optimizer.state(), twin.optimizer.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if case != "eps":
        step("run")
        step("twin")
        assert torch.equal(run.adapter.weights, twin.adapter.weights)
        assert run.window.step == steps_before + 1


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_is_as_large_as_it_is_when_it_is_clipped(base, clip):
    """Of 1e25, whose squares no float32 holds."""
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    backend.forward_backward("run", 1, request_of(rows_of(4, [9, 17])))
    run = backend._runs["run"]
    run.accumulator *= 1e25
    before = run.adapter.weights.detach().clone()
    request = StepRequest(grad_clip_norm=clip)
    if clip is None:
        with pytest.raises(TenSafeFault, match="grad_clip_norm"):
            backend.optim_step("run", request)
    else:
        assert backend.optim_step("run", request).grad_norm > 1e20
    assert torch.equal(run.adapter.weights, before) == (clip is None)
    assert torch.isfinite(run.adapter.weights).all()


def step_alone(optimizer: optimizers.RunOptimizer, gradient: torch.Tensor) -> list[bool]:
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return optimizers.step([optimizers.Update(optimizer, gradient, norm, 1e-2, 0.0)])


def test_moments_that_overflow_are_not_kept(base):
    """A second moment at infinity would hold the weights still from then on."""
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    run = backend._runs["run"]
    before = run.adapter.weights.detach().clone()
    assert step_alone(run.optimizer, torch.full_like(before, 1e25)) == [False]
    assert torch.equal(run.adapter.weights, before)
    assert run.optimizer.state() == {}
    assert step_alone(run.optimizer, torch.ones_like(before)) == [True]
    assert not torch.equal(run.adapter.weights, before)


def test_a_new_run_with_other_targets_is_not_mixed_with_the_one_before(base):
    backend = TorchBackend([base])
    request = request_of(rows_of(4, [9, 17]))
    plain = metric(backend_loss(backend, request), "loss")
    backend.open_run("first", settings(lora={"target_modules": ("q_proj",)}), None)
    backend.forward_backward("first", 1, request)
    backend.optim_step("first", StepRequest(learning_rate=0.5))
    assert metric(backend.forward("first", request), "loss") != pytest.approx(plain, abs=1e-3)
    backend.open_run("second", settings(lora={"target_modules": ("gate_proj",)}), None)
    assert metric(backend.forward("second", request), "loss") == pytest.approx(plain, abs=1e-6)


def backend_loss(backend: TorchBackend, request):
    """The base model's own loss: that of an adapter that was never trained."""
    backend.open_run("untrained", settings(), None)
    outcome = backend.forward("untrained", request)
    backend.close_run("untrained")
    return outcome
