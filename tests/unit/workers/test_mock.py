"""The mock backend: the page's numbers, and the same rules as the real one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tensafe.wire.status import TenSafeFault
from workers.mock import MockBackend, mock_grad_norm, mock_loss
from workers.operations import (
    ArtifactWeights,
    Batch,
    LossRequest,
    Prompt,
    Reduction,
    RunSettings,
    SampleRequest,
    SamplingParams,
    StepRequest,
)


def request(reduction: Reduction = Reduction.TOKEN_MEAN) -> LossRequest:
    tokens = np.arange(6, dtype=np.int32)
    weights = np.asarray([0, 1, 1, 1, 0, 1], np.float32)
    return LossRequest(Batch(np.asarray([0, 6]), tokens, tokens, weights), reduction=reduction)


def metrics(outcome) -> dict[str, float]:
    return {metric.name: metric.value for metric in outcome.metrics}


@pytest.fixture
def backend() -> MockBackend:
    backend = MockBackend()
    backend.open_run("run", RunSettings("any/model", seed=5), None)
    return backend


def sample(backend: MockBackend, **weights):
    prompts = [Prompt(text="Once upon a time"), Prompt(tokens=np.asarray([1, 2], np.int32))]
    return backend.sample(1, SampleRequest(prompts, SamplingParams(num_samples=2), **weights))


def test_the_pages_twenty_steps(backend):
    losses, norms = [], []
    for step in range(20):
        outcome = backend.forward_backward("run", 2 * step + 1, request())
        losses.append(metrics(outcome)["loss"])
        norms.append(metrics(outcome)["grad_norm"])
        applied = backend.optim_step("run", StepRequest())
        assert (applied.step, applied.applied, applied.learning_rate) == (step + 1, True, 1e-4)
        assert applied.grad_norm == norms[-1]
    assert losses == [mock_loss(step) for step in range(1, 21)]
    assert f"{losses[0]:.3f} {losses[-1]:.3f}" == "2.490 2.300"
    assert mock_loss(240) == pytest.approx(0.1)
    assert mock_loss(1000) == 0.1
    assert all(1.5 <= norm <= 1.599 for norm in norms)
    assert len(set(norms)) > 5
    assert sample(backend, run_id="run").completions[0].text == " [Mock completion for step 20]"


def test_the_seed_fixes_the_norms():
    assert mock_grad_norm(5, 1) == mock_grad_norm(5, 1)
    assert [mock_grad_norm(5, i) for i in range(9)] != [mock_grad_norm(6, i) for i in range(9)]


def test_outputs_have_the_batchs_length_and_metrics_count(backend):
    outcome = backend.forward("run", request())
    assert outcome.logprobs.tolist() == [0] * 6
    assert metrics(outcome) == {"loss": 2.49, "tokens": 6, "scored_tokens": 4}
    summed = backend.forward("run", request(Reduction.SUM))
    assert metrics(summed)["loss"] == pytest.approx(4 * 2.49)


def test_every_prompt_gets_its_samples(backend):
    outcome = sample(backend, model_ref="any")
    assert [item.prompt_index for item in outcome.completions] == [0, 0, 1, 1]
    assert outcome.completions[0].prompt == "Once upon a time"
    assert outcome.model_step == 0


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_saved_runs_go_on_alike(tmp_path, accumulation_steps):
    backend = MockBackend()
    settings = RunSettings("any", seed=5, accumulation_steps=accumulation_steps)
    backend.open_run("run", settings, None)

    def go_on(run: str) -> list:
        curve = []
        for seq in range(7, 15):
            curve.append(metrics(backend.forward_backward(run, seq, request())))
            curve.append(backend.optim_step(run, StepRequest()))
        return curve

    for seq in range(3):
        backend.forward_backward("run", seq, request())
        backend.optim_step("run", StepRequest())
    backend.save_state("run", tmp_path, include_optimizer=True)
    expected = go_on("run")
    assert backend.load_state("run", tmp_path, None).step == 3 // accumulation_steps
    assert go_on("run") == expected
    backend.open_run("moved", settings, tmp_path)
    assert go_on("moved") == expected
    saved = sample(backend, artifact=ArtifactWeights("art-1", tmp_path))
    assert saved.model_step == 3 // accumulation_steps


def test_weights_alone_drop_the_open_window(tmp_path):
    backend = MockBackend()
    backend.open_run("run", RunSettings("any", seed=5, accumulation_steps=2), None)
    backend.save_state("run", tmp_path, include_optimizer=True)
    backend.forward_backward("run", 1, request())
    backend.optim_step("run", StepRequest())
    backend.poison("run")
    assert not backend.load_state("run", tmp_path, False).optimizer_restored
    assert not backend.optim_step("run", StepRequest()).applied
    with pytest.raises(TenSafeFault) as caught:
        backend.optim_step("run", StepRequest())
    assert caught.value.detail.reason == "EMPTY_WINDOW"
    backend.forward_backward("run", 2, request())
    backend.load_state("run", tmp_path, False)
    backend.save_state("run", tmp_path, include_optimizer=True)
    assert json.loads((tmp_path / "state.json").read_text())["grad_norms"] == []


def test_it_refuses_what_it_cannot_mean(backend, tmp_path):
    odd = request()
    odd.loss = "dpo"
    with pytest.raises(TenSafeFault, match="dpo"):
        backend.forward_backward("run", 1, odd)
    with pytest.raises(TenSafeFault) as caught:
        backend.optim_step("run", StepRequest())
    assert caught.value.detail.reason == "WINDOW_POISONED"
    backend.save_state("run", tmp_path, include_optimizer=False)
    with pytest.raises(TenSafeFault, match="without optimizer"):
        backend.load_state("run", tmp_path, True)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(TenSafeFault, match="mock"):
        backend.load_state("run", tmp_path, None)
