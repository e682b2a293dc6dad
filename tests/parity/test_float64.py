"""The engine equals plain `peft` to 1e-9 in float64, family by family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_models import CONTEXT, FAMILIES, SCALED_AHEAD, UNCAPPED, Family, Wide
from parity.tiny_runs import metric, perturb, request_of, rows_of, settings
from transformers.models.llama import modeling_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.checks import UnsupportedModelError
from workers.engine.engine import TorchBackend
from workers.engine.norms import RmsNorm
from workers.operations import StepRequest

LENGTHS = [5, 23, 9, 12, 1, 17, 11]
MASKED = [2, 9, 9, 0, 0, 30, 4]
"""Of the third row and of the sixth nothing is scored."""
EXACT = 1e-9


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request) -> Family:
    return request.param


def pair(family: Family, context: int = CONTEXT, **options) -> tuple[TorchBackend, PlainPeft]:
    """A run, its B not zero, and plain `peft` with the same adapter."""
    lora = {"rank": 3, "alpha": 7.0, "target_modules": family.linear} | options.pop("lora", {})
    model = freeze("tiny", family.build(max_position_embeddings=context))
    backend = TorchBackend([model], token_budget=options.pop("token_budget", 10_000))
    backend.open_run("run", settings(lora=lora, **options), None)
    perturb(backend, "run")
    return backend, PlainPeft(family.build(max_position_embeddings=context), backend._runs["run"])


def test_the_engine_puts_its_own_norms_in_place(family):
    with Wide():
        model = freeze("tiny", family.build())
    assert sum(isinstance(part, RmsNorm) for part in model.module.modules()) == family.norms


@pytest.mark.parametrize("token_budget", [30, 10_000])
def test_loss_logprobs_and_every_gradient(family, token_budget):
    with Wide():
        backend, plain = pair(family, token_budget=token_budget)
    check_one_call(backend, plain, LENGTHS, MASKED)


@pytest.mark.parametrize(
    "name", ["llama-gqa", "gemma3-windows", "qwen2-tied-windows", "deepseek-latent"]
)
def test_documents_so_long_that_their_attention_is_not_held_whole(name):
    with Wide():
        backend, plain = pair(FAMILIES[name], context=1000, token_budget=1500)
    check_one_call(backend, plain, [800, 25, 990, 790, 12], [10, 0, 700, 300, 3])


def check_one_call(
    backend: TorchBackend, plain: PlainPeft, lengths: list[int], masked: list[int]
) -> None:
    rows = rows_of(3, lengths)
    with Wide():
        outcome = backend.forward_backward("run", 1, request_of(rows, masked=masked))
        scored = backend.forward("run", request_of(rows, masked=masked))
        loss = plain.loss(rows, masked)
        loss.backward()
        expected = plain.logprobs(rows)
    assert metric(outcome, "loss") == pytest.approx(loss.item(), abs=EXACT)
    assert metric(scored, "loss") == pytest.approx(loss.item(), abs=EXACT)
    masks = [torch.arange(n) >= m for n, m in zip(lengths, masked, strict=True)]
    theirs = (torch.cat(expected) * torch.cat(masks)).numpy()
    for ours in (outcome.logprobs, scored.logprobs):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=EXACT)

    run = backend._runs["run"]
    gradients = run.adapter.named(run.accumulator / run.window.denominator)
    reference = plain.named()
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        own = reference[name].grad
        assert own.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, own, rtol=0, atol=EXACT, msg=name)
    norm = torch.cat([tensor.grad.flatten() for tensor in plain.parameters()]).norm().item()
    assert metric(outcome, "grad_norm") == pytest.approx(norm, rel=EXACT)


def test_a_curve_of_twenty_steps(family):
    rate, decay = 5e-3, 0.05
    optimizer = {"learning_rate": rate, "weight_decay": decay, "grad_clip_norm": 0.5, "eps": 1e-6}
    with Wide():
        backend, plain = pair(family, optimizer=optimizer)
        stepper = torch.optim.AdamW(plain.parameters(), lr=rate, weight_decay=decay, eps=1e-6)
        losses = []
        for step in range(20):
            rows = rows_of(step % 4, [8, 13, 6])
            outcome = backend.forward_backward("run", step, request_of(rows, masked=[1, 5, 2]))
            backend.optim_step("run", StepRequest())
            loss = plain.loss(rows, [1, 5, 2])
            loss.backward()
            # torch's own clipping adds 1e-6 to the norm, which is seen at this precision.
            norm = torch.cat([tensor.grad.flatten() for tensor in plain.parameters()]).norm()
            for tensor in plain.parameters():
                tensor.grad *= min(1.0, 0.5 / norm.item())
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
            assert metric(outcome, "loss") == pytest.approx(losses[-1], abs=EXACT), step
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in backend._runs["run"].adapter.named().items():
        torch.testing.assert_close(tensor, plain.named()[name].detach(), rtol=0, atol=1e-8)


CAPS = {
    "gemma2": ("Gemma2", "Gemma2", {}, "linear map"),
    "gemma2-attention": ("Gemma2", "Gemma2", {"final_logit_softcapping": None}, "no softcap"),
    "gemma2-head": ("Gemma2", "Gemma2", {"attn_logit_softcapping": None}, "linear map"),
    "gemma3-head": ("Gemma3", "Gemma3Text", {"final_logit_softcapping": 30.0}, "linear map"),
}


@pytest.mark.parametrize("spread", [0.002, 0.15], ids=["small-logits", "large-logits"])
@pytest.mark.parametrize(("model", "config", "options", "says"), CAPS.values(), ids=CAPS.keys())
def test_capped_logits_are_refused(model, config, options, says, spread):
    """A cap is next to nothing as long as the logits are small, as in an untrained model."""
    capped = Family(model, config, options, 0).build(
        num_key_value_heads=2, head_dim=8, initializer_range=spread
    )
    with pytest.raises(UnsupportedModelError, match=says):
        freeze("tiny", capped.float())


@pytest.mark.parametrize("other", [SCALED_AHEAD, UNCAPPED], ids=lambda other: other.model)
def test_families_of_their_own_kind(other):
    with Wide():
        backend, plain = pair(other)
    assert sum(isinstance(part, RmsNorm) for part in backend._models["tiny"].module.modules()) == (
        other.norms
    )
    check_one_call(backend, plain, LENGTHS, MASKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["granite-scaled", "cohere-scaled"])
def test_a_scale_is_as_exact_as_the_configuration_says_it(name, dtype):
    """In a narrow type too, from whose logits it could not be told."""
    model = freeze("tiny", FAMILIES[name].build().to(dtype))
    assert model.logit_scale == {"granite-scaled": 1 / 3, "cohere-scaled": 0.3}[name]


def test_hidden_states_that_a_scale_rounds_are_known_in_a_narrow_type():
    module = SCALED_AHEAD.build(hidden_size=320, dim_model_base=32).bfloat16()
    assert freeze("tiny", module).logit_scale == 0.1


def test_a_scale_that_no_configuration_says_is_refused(monkeypatch):
    module = FAMILIES["llama-gqa"].build()
    head = module.lm_head
    own = module.forward

    def scaled(*args, **options):
        output = own(*args, **options)
        output.logits = 1.02 * output.logits
        return output

    monkeypatch.setattr(module, "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="linear map"):
        freeze("tiny", module)
    assert module.get_output_embeddings() is head


def test_attention_that_knows_more_than_ours_is_refused(monkeypatch):
    """Here a sink, told by a name that ours has not heard of, so that it passes it over."""

    def eager(module, query, key, value, mask, scaling, dropout=0.0, sinks=None, **_):
        key, value = (part.repeat_interleave(2, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if mask is None else scores + mask
        more = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        shares = torch.cat([scores, more], -1).softmax(-1)[..., :-1]
        return (shares @ value).transpose(1, 2).contiguous(), shares

    own = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **options):
        return own(self, *args, sinks=torch.full((4,), 2.0).double(), **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    module = FAMILIES["llama-gqa"].build(attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="laid end to end"):
        freeze("tiny", module)


def test_a_model_that_keeps_more_of_the_past_than_keys_and_values_is_refused(monkeypatch):
    """Here the token before, of the same document: packed it is what it is alone."""
    module = FAMILIES["llama-gqa"].build()
    layer = module.model.layers[0]
    own = layer.forward

    def forward(hidden, *args, position_ids, **options):
        before = hidden.roll(1, 1) * (position_ids > 0)[..., None]
        return own(hidden + before, *args, position_ids=position_ids, **options)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="cannot be added one by one"):
        freeze("tiny", module)


@pytest.mark.parametrize("layers", [["sliding_attention"] * 2, ["full_attention"] * 2], ids=str)
def test_no_row_is_longer_than_a_window_that_only_the_masks_know(layers):
    """Attention is not told of it in this family, and a pass has no mask."""
    options = {"num_key_value_heads": 2, "sliding_window": 9, "layer_types": layers}
    module = Family("Qwen2Moe", "Qwen2Moe", options, 5).build(use_sliding_window=True).float()
    model = freeze("tiny", module)
    assert model.context_length == (9 if layers[0] == "sliding_attention" else CONTEXT)


STATES = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 1,
}
REFUSED = {
    "gpt-oss": (
        "GptOss",
        "GptOss",
        {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4},
        "no s_aux",
    ),
    "gptj": ("GPTJ", "GPTJ", {"rotary_dim": 4}, "own interface"),
    "openai-gpt": ("OpenAIGPTLMHead", "OpenAIGPT", {}, "without padding"),
    "falcon-h1": ("FalconH1", "FalconH1", STATES, "laid end to end"),
    "jamba": ("Jamba", "Jamba", {"num_key_value_heads": 2, "use_mamba_kernels": False}, ""),
    "qwen3-next": ("Qwen3Next", "Qwen3Next", {"num_key_value_heads": 2, "head_dim": 8}, ""),
    "deepseek-v3.2": ("DeepseekV32", "DeepseekV32", {}, "chooses which tokens .*index_topk"),
    "doge": ("Doge", "Doge", {"num_key_value_heads": 2}, "chooses which tokens .*keep_window"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "config", "options", "says"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_cannot_be_packed_is_refused_by_name(model, config, options, says, dtype):
    """In a narrow type too, whose rounding is larger than what a state of a few tokens does."""
    module = Family(model, config, options, 0).build().to(dtype)
    with pytest.raises(UnsupportedModelError, match=f"^tiny: .*{says}"):
        freeze("tiny", module)


def test_no_row_is_so_long_that_its_neighbours_positions_change():
    """`transformers` turns all rows of a pass by the long factors once one of them is long."""
    with Wide():
        model = freeze("tiny", FAMILIES["phi3-longrope"].build())
    assert model.context_length == 32
    backend = TorchBackend([model], token_budget=1000)
    for run in ("short", "long"):
        backend.open_run(run, settings(lora={"target_modules": ("o_proj",)}), None)
    request = request_of(rows_of(1, [12]))
    alone = backend.forward("short", request)
    outcomes = backend.forward_backward_group(
        [("short", 1, request), ("long", 1, request_of(rows_of(2, [32])))]
    )
    np.testing.assert_allclose(outcomes[0].logprobs, alone.logprobs, rtol=0, atol=EXACT)
    with pytest.raises(TenSafeFault, match="context is 32"):
        backend.forward("long", request_of(rows_of(2, [33])))
