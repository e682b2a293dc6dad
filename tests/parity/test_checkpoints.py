"""Saved state: plain `peft` loads it, and a run that is restored goes on to the same bits."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from parity.tiny_runs import hf_batch, metric, request_of, rows_of, settings, tiny_llama
from safetensors.torch import load_file, save_file

from tensafe.wire.status import TenSafeFault
from workers.engine.engine import TorchBackend
from workers.operations import StepRequest

OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "adam": {"name": "adam"},
    "sgd": {"name": "sgd", "beta1": None, "beta2": None, "eps": None, "momentum": 0.9},
}


def train(backend: TorchBackend, run: str, steps: range) -> list[float]:
    curve = []
    for step in steps:
        request = request_of(rows_of(step, [9, 17, 4]))
        curve.append(metric(backend.forward_backward(run, 2 * step + 1, request), "loss"))
        backend.optim_step(run, StepRequest())
    return curve


def test_plain_peft_loads_it_with_the_same_logits(base, tmp_path):
    backend = TorchBackend([base])
    backend.open_run("run", settings(lora={"dropout": 0.1, "alpha": 12.0}), None)
    train(backend, "run", range(3))
    saved = backend.save_state("run", tmp_path, include_optimizer=False)
    assert (saved.step, saved.model_ref) == (3, "tiny")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    rows = rows_of(99, [20, 31])
    theirs = loaded(**hf_batch(rows)).loss.item()
    ours = metric(backend.forward("run", request_of(rows)), "loss")
    assert ours == pytest.approx(theirs, abs=2e-6)
    assert abs(theirs - tiny_llama()(**hf_batch(rows)).loss.item()) > 1e-3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "state.json"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_restored_runs_continue_to_the_same_bits(base, tmp_path, optimizer, accumulation_steps):
    options = settings(
        optimizer=optimizer, lora={"dropout": 0.2}, accumulation_steps=accumulation_steps
    )
    backend = TorchBackend([base])
    backend.open_run("run", options, None)
    train(backend, "run", range(3))
    # Three calls leave a window of two half open.
    backend.save_state("run", tmp_path, include_optimizer=True)
    assert (tmp_path / "accumulator.safetensors").exists() == (accumulation_steps == 2)
    expected = train(backend, "run", range(3, 7))
    final = backend._runs["run"].adapter.weights.detach().clone()

    reloaded = backend.load_state("run", tmp_path, None)
    assert (reloaded.step, reloaded.optimizer_restored) == (3 // accumulation_steps, True)
    assert train(backend, "run", range(3, 7)) == expected
    assert torch.equal(backend._runs["run"].adapter.weights, final)

    # Another process, another worker: the run is opened from the files.
    elsewhere = TorchBackend([base])
    elsewhere.open_run("moved", options, tmp_path)
    assert train(elsewhere, "moved", range(3, 7)) == expected
    assert torch.equal(elsewhere._runs["moved"].adapter.weights, final)


def test_weights_alone_leave_counters_and_moments(base, tmp_path):
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    train(backend, "run", range(2))
    backend.save_state("run", tmp_path, include_optimizer=True)
    saved = backend._runs["run"].adapter.weights.detach().clone()
    train(backend, "run", range(2, 5))
    moment = backend._runs["run"].optimizer.state()["exp_avg"].clone()
    outcome = backend.load_state("run", tmp_path, False)
    assert (outcome.step, outcome.optimizer_restored) == (5, False)
    assert torch.equal(backend._runs["run"].adapter.weights, saved)
    assert torch.equal(backend._runs["run"].optimizer.state()["exp_avg"], moment)


def test_weights_alone_drop_the_open_window(base, tmp_path):
    """Its gradient is that of other weights; what comes next starts a window of its own."""
    backend = TorchBackend([base])
    request = request_of(rows_of(7, [9, 17]))
    for run in ("run", "twin"):
        backend.open_run(run, settings(accumulation_steps=2), None)
        train(backend, run, range(2))
    backend.save_state("run", tmp_path, include_optimizer=False)
    for poison in (False, True):
        backend.forward_backward("run", 5, request_of(rows_of(8, [30])))
        assert not backend.optim_step("run", StepRequest()).applied
        if poison:
            backend.poison("run")
        backend.load_state("run", tmp_path, None)
        assert backend._runs["run"].accumulator is None
        norms = []
        for run in ("run", "twin"):
            backend.forward_backward(run, 7, request)
            assert not backend.optim_step(run, StepRequest()).applied
            backend.forward_backward(run, 9, request)
            norms.append(backend.optim_step(run, StepRequest()).grad_norm)
        assert norms[0] == norms[1]
        ours, theirs = (backend._runs[run].adapter.weights for run in ("run", "twin"))
        assert torch.equal(ours, theirs)
        assert backend._runs["run"].window.step == backend._runs["twin"].window.step
        backend.save_state("run", tmp_path, include_optimizer=False)


def test_the_whole_state_brings_its_seed(base, tmp_path):
    """Dropout masks go on as they would have, in a run that was made with another seed."""
    backend = TorchBackend([base])
    for run, seed in (("run", 5), ("other", 6)):
        backend.open_run(run, settings(seed=seed, lora={"dropout": 0.3}), None)
        train(backend, run, range(2))
    backend.save_state("run", tmp_path, include_optimizer=True)
    expected = train(backend, "run", range(2, 5))
    backend.load_state("other", tmp_path, True)
    assert train(backend, "other", range(2, 5)) == expected
    # It keeps the seed when it is saved again.
    again = tmp_path / "again"
    again.mkdir()
    backend.save_state("other", again, include_optimizer=False)
    assert json.loads((again / "state.json").read_text())["seed"] == 5


@pytest.mark.parametrize(
    ("other", "include", "says"),
    [
        ({"lora": {"rank": 8}}, None, "rank is 4 and the run's is 8"),
        ({"lora": {"alpha": 9.0}}, None, "alpha is 8.0"),
        ({"lora": {"target_modules": ("q_proj",)}}, False, "target_modules"),
        ({"optimizer": OPTIMIZERS["sgd"]}, None, "optimizer is adamw and the run's is sgd"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(base, tmp_path, other, include, says):
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    train(backend, "run", range(2))
    backend.save_state("run", tmp_path, include_optimizer=True)
    backend.open_run("other", settings(seed=3, **other), None)
    before = backend._runs["other"].adapter.weights.detach().clone()
    with pytest.raises(TenSafeFault, match=says) as caught:
        backend.load_state("other", tmp_path, include)
    assert caught.value.detail.reason == "ARTIFACT_MISMATCH"
    assert torch.equal(backend._runs["other"].adapter.weights, before)
    train(backend, "other", range(1))
    assert backend._runs["other"].window.step == 1


@pytest.mark.parametrize(
    ("moment", "value", "says"),
    [
        ("exp_avg", float("nan"), "its exp_avg holds NaN or infinite"),
        ("exp_avg_sq", float("inf"), "its exp_avg_sq holds NaN or infinite"),
        ("exp_avg_sq", -1e-3, "its exp_avg_sq holds negative"),
        ("step", -1.0, "its step holds negative"),
        ("step", torch.tensor(3), "its step is no float32 number"),
        ("exp_avg_sq", None, "instead of"),
        ("weights", float("inf"), "weights hold NaN or infinite"),
    ],
)
def test_numbers_that_no_update_can_have_made_are_refused(base, tmp_path, moment, value, says):
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    train(backend, "run", range(2))
    backend.save_state("run", tmp_path, include_optimizer=True)
    whose = "adapter_model" if moment == "weights" else "optimizer"
    path = tmp_path / f"{whose}.safetensors"
    tensors = intact = load_file(path)
    names = [name for name in tensors if moment in ("weights", name.partition(".")[0])]
    if value is None:
        tensors = {name: each for name, each in intact.items() if name not in names}
    elif isinstance(value, torch.Tensor):
        tensors[names[0]] = value
    else:
        tensors[names[0]].view(-1)[0] = value
    save_file(tensors, path)
    weights = backend._runs["run"].adapter.weights.detach().clone()
    train(backend, "run", range(2, 3))
    before = {name: each.clone() for name, each in backend._runs["run"].optimizer.state().items()}
    assert not torch.equal(backend._runs["run"].adapter.weights, weights)
    with pytest.raises(TenSafeFault, match=says) as caught:
        backend.load_state("run", tmp_path, None)
    assert caught.value.detail.reason == "ARTIFACT_MISMATCH"
    assert backend._runs["run"].window.step == 3
    for name, each in backend._runs["run"].optimizer.state().items():
        assert torch.equal(each, before[name])
    assert not torch.equal(backend._runs["run"].adapter.weights, weights)
    if moment != "weights":
        assert backend.load_state("run", tmp_path, False).step == 3
        assert torch.equal(backend._runs["run"].adapter.weights, weights)


def test_optimizer_that_was_not_saved_is_refused_when_asked_for(base, tmp_path):
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    backend.save_state("run", tmp_path, include_optimizer=False)
    with pytest.raises(TenSafeFault, match="without optimizer state"):
        backend.load_state("run", tmp_path, True)
    assert backend.load_state("run", tmp_path, None).optimizer_restored is False
