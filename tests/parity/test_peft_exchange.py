"""Adapters go to plain `peft` and come from it, and train on the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_models import FAMILIES, Family
from parity.tiny_runs import (
    hf_batch,
    metric,
    perturb,
    request_of,
    rows_of,
    settings,
    tiny_llama,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.operations import StepRequest

ROWS = [9, 17, 4]
RATE = 5e-3


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request) -> Family:
    return request.param


def logits(model: torch.nn.Module, rows) -> torch.Tensor:
    batch = hf_batch(rows)
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trained(family: Family, alpha: float, steps: int = 3) -> TorchBackend:
    backend = TorchBackend([freeze("tiny", family.build().float())], token_budget=1000)
    options = settings(lora={"rank": 3, "alpha": alpha, "target_modules": family.linear})
    backend.open_run("run", options, None)
    perturb(backend, "run")
    for step in range(steps):
        backend.forward_backward("run", step, request_of(rows_of(step, ROWS)))
        backend.optim_step("run", StepRequest())
    return backend


@pytest.mark.parametrize("alpha", [7.0, 7.5])
def test_plain_peft_loads_what_was_saved_and_gives_the_same_logits(family, alpha, tmp_path):
    backend = trained(family, alpha)
    plain = PlainPeft(family.build().float(), backend._runs["run"])
    backend.save_state("run", tmp_path, include_optimizer=False)
    module = family.build().float()
    rows = rows_of(9, [20, 7])
    untrained = logits(module, rows)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    found = logits(loaded, rows)
    assert torch.equal(found, logits(plain.model, rows))
    assert (found - untrained).abs().max() > 0.05
    layers = [part for part in loaded.modules() if isinstance(part, LoraLayer)]
    assert layers
    assert all(layer.scaling == {"default": alpha / 3} for layer in layers)
    mine = backend.forward("run", request_of(rows, masked=0))
    theirs = torch.cat(plain.logprobs(rows))
    np.testing.assert_allclose(mine.logprobs, theirs, rtol=0, atol=2e-5)
    with torch.no_grad():
        assert metric(mine, "loss") == pytest.approx(
            loaded(**hf_batch(rows, masked=0)).loss.item(), abs=1e-5
        )


def train_plainly(model: peft.PeftModel, steps: range) -> list[float]:
    """SGD, whose steps do not magnify rounding as Adam's do."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = torch.optim.SGD(parameters, lr=RATE)
    losses = []
    for step in steps:
        loss = model(**hf_batch(rows_of(step, ROWS))).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


def made_elsewhere(family: Family, directory: Path) -> peft.PeftModel:
    """Trained a few steps by plain `peft`, and saved by it."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=list(family.linear), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(family.build().float(), config).eval()
    train_plainly(model, range(4))
    model.save_pretrained(str(directory))
    return model


def receiving(family: Family, **lora) -> TorchBackend:
    backend = TorchBackend([freeze("tiny", family.build().float())], token_budget=1000)
    optimizer = {"name": "sgd", "learning_rate": RATE, "weight_decay": 0.0, "momentum": 0.0}
    shape = {"rank": 3, "alpha": 7.0, "target_modules": family.linear} | lora
    backend.open_run("run", settings(optimizer=optimizer, lora=shape), None)
    return backend


def test_an_adapter_made_elsewhere_trains_on_like_plain_peft(family, tmp_path):
    model = made_elsewhere(family, tmp_path)
    backend = receiving(family)
    outcome = backend.load_state("run", tmp_path, None)
    assert (outcome.step, outcome.optimizer_restored) == (0, False)
    expected = train_plainly(model, range(4, 12))
    for step, loss in zip(range(4, 12), expected, strict=True):
        own = backend.forward_backward("run", step, request_of(rows_of(step, ROWS)))
        assert metric(own, "loss") == pytest.approx(loss, abs=2e-5)
        backend.optim_step("run", StepRequest())
    theirs = peft.get_peft_model_state_dict(model)
    for name, tensor in backend._runs["run"].adapter.named().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


CHANGES = {
    "rank": ({"rank": 4}, "its rank is 3 and the run's is 4"),
    "alpha": ({"alpha": 8.0}, "its alpha is 7.0"),
    "targets": ({"target_modules": ("q_proj",)}, "target_modules"),
}


@pytest.mark.parametrize(("lora", "says"), CHANGES.values(), ids=CHANGES.keys())
def test_an_adapter_made_elsewhere_of_another_shape_is_refused(tmp_path, lora, says):
    family = FAMILIES["llama-gqa"]
    made_elsewhere(family, tmp_path)
    refused(receiving(family, **lora), tmp_path, says)


@pytest.mark.parametrize("change", ["renamed", "cut", "missing", "extra"])
def test_an_adapter_made_elsewhere_with_other_tensors_is_refused(tmp_path, change):
    family = FAMILIES["llama-gqa"]
    made_elsewhere(family, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = min(tensors)
    if change == "cut":
        tensors[name] = tensors[name][:, :-1].clone()
    elif change == "extra":
        tensors[f"{name}.more"] = tensors[name].clone()
    else:
        tensor = tensors.pop(name)
        if change == "renamed":
            tensors[name.replace("layers.0", "layers.7")] = tensor
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(receiving(family), tmp_path, "has shape" if change == "cut" else "tensors differ")


def refused(backend: TorchBackend, directory: Path, says: str) -> None:
    before = backend._runs["run"].adapter.weights.detach().clone()
    with pytest.raises(TenSafeFault, match=says) as caught:
        backend.load_state("run", directory, None)
    assert caught.value.detail.reason == "ARTIFACT_MISMATCH"
    assert torch.equal(backend._runs["run"].adapter.weights, before)
    backend.forward_backward("run", 1, request_of(rows_of(1, ROWS)))
    assert backend.optim_step("run", StepRequest()).step == 1


def test_the_optimizer_of_an_adapter_made_elsewhere_is_not_to_be_had(tmp_path):
    family = FAMILIES["llama-gqa"]
    made_elsewhere(family, tmp_path)
    with pytest.raises(TenSafeFault, match="without optimizer state"):
        receiving(family).load_state("run", tmp_path, True)


def test_what_was_saved_is_told_apart_from_what_was_made_elsewhere(base, tmp_path):
    """A run's own folder without its state is `peft`'s; with it, its step and model count."""
    backend = TorchBackend([base])
    backend.open_run("run", settings(), None)
    backend.save_state("run", tmp_path, include_optimizer=False)
    state = tmp_path / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": "other"}))
    with pytest.raises(TenSafeFault, match="not saved by the torch backend"):
        backend.load_state("run", tmp_path, None)
    state.unlink()
    assert backend.load_state("run", tmp_path, None).optimizer_restored is False
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert plain.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("Qwen3Moe", {"num_experts": 4, "mlp_only_layers": [0]}),
        ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 16}),
        ("Glm4Moe", {"n_routed_experts": 4, "first_k_dense_replace": 1}),
        # Its tensors are read under other names, without a word of it in the configuration.
        ("Laguna", {"num_experts": 4, "shared_expert_intermediate_size": 16, "head_dim": 8}),
    ],
)
def test_beside_experts_only_what_plain_peft_finds_by_its_name_is_adapted(model, options, tmp_path):
    """`peft` takes `gate_proj` for the experts' own, where a model has experts."""
    sizes = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    family = Family(model, model, sizes | options, 0)
    base = freeze("tiny", family.build().float())
    targets = tuple(base.linear_modules)
    assert {"q_proj", "o_proj"} <= set(targets)
    backend = TorchBackend([base], token_budget=1000)
    backend.open_run("run", settings(lora={"rank": 3, "target_modules": targets}), None)
    perturb(backend, "run")
    backend.save_state("run", tmp_path, include_optimizer=False)
    rows = rows_of(9, [20, 7])
    loaded = peft.PeftModel.from_pretrained(family.build().float(), tmp_path).eval()
    with torch.no_grad():
        plain = loaded(**hf_batch(rows)).loss.item()
    assert metric(backend.forward("run", request_of(rows)), "loss") == pytest.approx(
        plain, abs=1e-5
    )
