"""The engine against a plain `transformers` + `peft` loop with the Hugging Face loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.group_members import SGD
from parity.peft_reference import PlainPeft
from parity.tiny_runs import (
    TARGETS,
    hf_batch,
    metric,
    perturb,
    request_of,
    rows_of,
    settings,
    tiny_llama,
)

from workers.engine.engine import TorchBackend
from workers.operations import Reduction, StepRequest


@pytest.mark.parametrize("budget", [16, 10_000])
def test_loss_logprobs_and_every_gradient(base, budget):
    backend = TorchBackend([base], token_budget=budget)
    backend.open_run("run", settings(), None)
    perturb(backend, "run")
    reference = PlainPeft(tiny_llama(), backend._runs["run"])
    rows = rows_of(3, [5, 14, 9, 12])

    outcome = backend.forward_backward("run", 1, request_of(rows))
    loss = reference.loss(rows)
    loss.backward()

    assert metric(outcome, "loss") == pytest.approx(loss.item(), abs=1e-6)
    begin = 0
    for theirs in reference.logprobs(rows):
        ours = torch.from_numpy(outcome.logprobs[begin : begin + len(theirs)])
        assert ours[0] == 0
        torch.testing.assert_close(ours[1:], theirs[1:], atol=2e-6, rtol=1e-5)
        begin += len(theirs)

    run = backend._runs["run"]
    gradients = run.adapter.named(run.accumulator / run.window.denominator)
    theirs = {name: tensor.grad for name, tensor in reference.named().items()}
    assert gradients.keys() == theirs.keys()
    assert len(gradients) == 2 * 2 * len(TARGETS)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm().item()
    assert metric(outcome, "grad_norm") == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("weight", [1e-25, 1e18])
def test_the_gradients_norm_does_not_depend_on_the_size_of_weights(base, weight):
    """Of a float32 gradient the squares would be 0, or infinite."""
    norms = []
    for scale in (1.0, weight):
        backend = TorchBackend([base])
        backend.open_run("run", settings(), None)
        perturb(backend, "run")
        request = request_of(rows_of(3, [5, 9]))
        request.batch.weights = np.full(len(request.batch.input_tokens), scale, np.float32)
        norms.append(metric(backend.forward_backward("run", 1, request), "grad_norm"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("weight", [1e-25, 1e20])
def test_such_a_gradient_is_applied_and_clipped_all_the_same(base, weight):
    clip = 1.0 if weight > 1 else 1e-30
    backend = TorchBackend([base])
    plain = SGD | {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    backend.open_run("run", settings(optimizer=plain | {"grad_clip_norm": clip}), None)
    perturb(backend, "run")
    before = backend._runs["run"].adapter.weights.detach().clone()
    request = request_of(rows_of(3, [5, 9]), reduction=Reduction.SUM)
    request.batch.weights = np.full(len(request.batch.input_tokens), weight, np.float32)
    norm = metric(backend.forward_backward("run", 1, request), "grad_norm")
    outcome = backend.optim_step("run", StepRequest())
    assert outcome.applied
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-3)
    if weight > 1:
        moved = (backend._runs["run"].adapter.weights.detach() - before).norm().item()
        assert moved == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "create"),
    [
        (
            {"name": "adamw", "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        ),
        (
            {"name": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 0.1},
            lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=0.1, weight_decay=0.01),
        ),
        (
            {"name": "adam", "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
            lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
        ),
        (
            {"name": "sgd", "weight_decay": 0.01, "momentum": 0.9},
            lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.01, momentum=0.9),
        ),
    ],
    ids=["adamw", "adamw-options", "adam", "sgd"],
)
def test_ten_step_curve(base, optimizer, create):
    backend = TorchBackend([base])
    clip = 0.5
    backend.open_run("run", settings(optimizer=optimizer | {"grad_clip_norm": clip}), None)
    perturb(backend, "run")
    reference = PlainPeft(tiny_llama(), backend._runs["run"])
    parameters = reference.parameters()
    stepper = create(parameters)
    losses = []
    for step in range(10):
        rows = rows_of(step % 3, [8, 13, 6])
        outcome = backend.forward_backward("run", 2 * step + 1, request_of(rows))
        applied = backend.optim_step("run", StepRequest())

        loss = reference.loss(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        stepper.step()
        stepper.zero_grad()

        losses.append(loss.item())
        assert metric(outcome, "loss") == pytest.approx(losses[-1], rel=2e-4), step
        assert applied.grad_norm == pytest.approx(norm.item(), rel=2e-3), step
        assert (applied.step, applied.applied) == (step + 1, True)
    assert losses[9] < losses[0]


def test_per_call_options_override_the_runs(base):
    backend = TorchBackend([base])
    sgd = {"name": "sgd", "weight_decay": 0.0, "momentum": 0.0, "learning_rate": 1.0}
    backend.open_run("run", settings(optimizer=sgd | {"grad_clip_norm": 1e-6}), None)
    request = request_of(rows_of(0, [9, 9]))
    weights = backend._runs["run"].adapter.weights

    def update(step: StepRequest) -> torch.Tensor:
        backend.forward_backward("run", 1, request)
        before = weights.detach().clone()
        outcome = backend.optim_step("run", step)
        moved = weights.detach() - before
        assert outcome.learning_rate == (1.0 if step.learning_rate is None else step.learning_rate)
        return moved

    assert update(StepRequest()).norm().item() == pytest.approx(1e-6, rel=1e-3)
    assert update(StepRequest(learning_rate=0.5)).norm().item() == pytest.approx(5e-7, rel=1e-3)
    assert update(StepRequest(grad_clip_norm=1e-5)).norm().item() == pytest.approx(1e-5, rel=1e-3)
    assert update(StepRequest(learning_rate=0.0)).abs().max() == 0
    before = weights.detach().clone()
    decayed = update(StepRequest(grad_clip_norm=1e-9, weight_decay=0.5, learning_rate=0.1))
    torch.testing.assert_close(decayed, -0.05 * before, atol=1e-7, rtol=1e-3)


def test_a_new_adapter_changes_nothing_and_its_initialisation_is_pefts(base):
    backend = TorchBackend([base])
    request = request_of(rows_of(0, [9, 9]))
    backend.open_run("run", settings(seed=1), None)
    backend.open_run("twin", settings(seed=1), None)
    backend.open_run("other", settings(seed=2), None)
    plain = tiny_llama()(**hf_batch(rows_of(0, [9, 9]))).loss.item()
    for run in ("run", "twin", "other"):
        assert metric(backend.forward(run, request), "loss") == pytest.approx(plain, abs=1e-6)
    weights = {name: backend._runs[name].adapter.weights for name in ("run", "twin", "other")}
    assert torch.equal(weights["run"], weights["twin"])
    assert not torch.equal(weights["run"], weights["other"])
    for name, tensor in backend._runs["run"].adapter.named().items():
        if ".lora_B." in name:
            assert tensor.abs().max() == 0
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
