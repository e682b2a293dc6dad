"""Every loss through the whole engine: held to plain `peft` and NumPy; cut, and in company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from parity.loss_calls import COMPARING, LOSSES, loss_request, plain_logits, scored_case
from parity.peft_reference import PlainPeft
from parity.scarce_memory import fault_at
from parity.tiny_models import FAMILIES, Wide
from parity.tiny_runs import metric, perturb, settings, tiny_llama
from unit.workers.numpy_losses import answer

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.losses import (
    Choice,
    LossInput,
    LossMetric,
    LossOutput,
    LossRegistry,
    LossTerms,
    Scored,
    loss,
)
from workers.losses.registry import BUILT_IN
from workers.operations import (
    ArtifactWeights,
    LossOutcome,
    LossRequest,
    Reference,
    StepRequest,
)

EXACT = 1e-9
FAMILY = FAMILIES["qwen3-tied"]
LORA = {"rank": 3, "alpha": 7.0, "target_modules": FAMILY.linear}
with Wide():
    MODEL = freeze("tiny", FAMILY.build())


class BrokenSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, too_long):
        ctx.too_long = too_long
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.too_long:
            return torch.cat([grad, grad]), None
        raise ZeroDivisionError("a plug-in's own error")


BREAKS = {
    "itself": lambda values: 1 / 0,
    "its slope": lambda values: {"terms": BrokenSlope.apply(values, False)},
    "the shape of its slope": lambda values: {"terms": BrokenSlope.apply(values, True)},
    "no slope": lambda values: {"terms": values.detach()},
    "complex terms": lambda values: {"terms": values.to(torch.complex128)},
    "too few terms": lambda values: {"terms": values[1:]},
    "a metric": lambda values: {"metrics": {"distance": 3.0}},
    "an output": lambda values: {"outputs": {"kept": values.detach().numpy()}},
    "an output's shape": lambda values: {"outputs": {"kept": values.detach()[1:]}},
}


@loss(
    inputs=[LossInput("wanted", "the log-probability to reach")],
    options=[Choice("broken", "what fails on batches below 0", "itself", tuple(BREAKS))],
    metrics=[LossMetric("distance", "mean", "from it")],
    outputs=[LossOutput("kept", "what it likes")],
)
def broken(scored: Scored, broken: str) -> LossTerms:
    """A plug-in that fails on some batches."""
    terms = (scored.logprobs - scored.inputs["wanted"]) ** 2
    fails = scored.inputs["wanted"].min() < 0
    return LossTerms(**{"terms": terms} | (BREAKS[broken](terms) if fails else {}))


def backend_of(
    *runs: str, budget: int = 10_000, model: BaseModel = MODEL, **options
) -> TorchBackend:
    registry = LossRegistry([*BUILT_IN, broken.named("broken")])
    backend = TorchBackend([model], token_budget=budget, losses=registry)
    for number, run in enumerate(runs):
        lora = LORA | options.get("lora", {})
        backend.open_run(run, settings(lora=lora, seed=number), None)
        perturb(backend, run, seed=number + 1)
    return backend


@pytest.fixture(scope="module")
def other_adapter(tmp_path_factory) -> ArtifactWeights:
    """An artifact of another shape than the runs have."""
    with Wide():
        backend = backend_of()
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ("q_proj", "down_proj")}
    backend.open_run("other", settings(lora=lora), None)
    perturb(backend, "other", seed=9)
    directory = tmp_path_factory.mktemp("artifact")
    backend.save_state("other", directory, include_optimizer=False)
    return ArtifactWeights("art-other", directory)


def check(key: str, request: LossRequest, budget: int, reference: PlainPeft | None = None) -> None:
    name, options, reduction = LOSSES[key]
    with Wide():
        backend = backend_of("run", budget=budget)
        run = backend._runs["run"]
        plain = PlainPeft(FAMILY.build(), run)
        outcome = backend.forward_backward("run", 1, request)
        forward = backend.forward("run", request)
        logits = plain_logits(plain)
        with torch.no_grad(), (reference or plain).model.disable_adapter():
            base = plain_logits(reference or plain)
        if reference is not None:
            with torch.no_grad():
                base = plain_logits(reference)
    case, mask = scored_case(request, logits.detach().numpy(), base.numpy())
    expected = answer(name, options, reduction, case)
    slopes = np.zeros(logits.shape)
    slopes[mask] = expected.slopes
    logits.backward(torch.from_numpy(slopes))

    gradients = run.adapter.named(run.accumulator / run.window.denominator)
    for tensor, own in plain.named().items():
        torch.testing.assert_close(gradients[tensor], own.grad, rtol=0, atol=EXACT, msg=tensor)
    norm = torch.cat([tensor.grad.flatten() for tensor in plain.parameters()]).norm().item()
    assert norm > 1e-3
    assert metric(outcome, "grad_norm") == pytest.approx(norm, rel=EXACT)
    for ours in (outcome, forward):
        assert metric(ours, "loss") == pytest.approx(expected.loss, abs=EXACT)
        assert metric(ours, "scored_tokens") == mask.sum()
        for own, value in expected.metrics.items():
            assert metric(ours, own) == pytest.approx(value, abs=EXACT), own
        for output, values in expected.outputs.items():
            found = ours.outputs[output]
            whole = found.values if found.per_datum else found.values[mask]
            np.testing.assert_allclose(whole, values, rtol=0, atol=EXACT)
            assert found.per_datum or not found.values[~mask].any()
        assert ours.logprobs.shape == request.batch.target_tokens.shape


@pytest.mark.parametrize("budget", [30, 10_000])
@pytest.mark.parametrize("key", LOSSES)
def test_plain_peft_and_numpy_agree(key, budget):
    check(key, loss_request(key), budget)


@pytest.mark.parametrize("budget", [30, 10_000])
@pytest.mark.parametrize("key", [*COMPARING, "dpo"])
def test_a_saved_adapter_as_reference(key, budget, other_adapter):
    with Wide():
        backend = backend_of()
        lora = {"rank": 2, "alpha": 4.0, "target_modules": ("q_proj", "down_proj")}
        backend.open_run("other", settings(lora=lora), None)
        backend.load_state("other", other_adapter.directory, include_optimizer=False)
        reference = PlainPeft(FAMILY.build(), backend._runs["other"])
    request = loss_request(key, reference=Reference("artifact_id", other_adapter))
    check(key, request, budget, reference)


def test_an_untrained_run_has_no_distance_to_its_base():
    backend = backend_of()
    backend.open_run("run", settings(lora=LORA | {"dropout": 0.5}), None)
    for key in ("kl", "kl-forward"):
        outcome = backend.forward("run", loss_request(key))
        assert metric(outcome, "kl") == pytest.approx(0, abs=1e-12)
        assert metric(outcome, "loss") == pytest.approx(0, abs=1e-12)


examples = hypothesis(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def same(ours: LossOutcome, theirs: LossOutcome) -> None:
    """Equal metrics, by name, value, weight and way to combine; equal outputs."""
    assert [(m.name, m.combine) for m in ours.metrics] == [
        (m.name, m.combine) for m in theirs.metrics
    ]
    for one, two in zip(ours.metrics, theirs.metrics, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-9, abs=1e-11), one.name
        assert one.weight == pytest.approx(two.weight, rel=1e-12)
    assert ours.outputs.keys() == theirs.outputs.keys()
    for name, output in ours.outputs.items():
        np.testing.assert_allclose(output.values, theirs.outputs[name].values, atol=EXACT)


@examples
@given(
    key=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 50),
    budget=st.integers(1, 90),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_no_cut_changes_a_result_or_a_metric(key, seed, budget, dropout):
    whole, cut = (
        backend_of("run", budget=tokens, lora={"dropout": dropout}) for tokens in (10_000, budget)
    )
    request = loss_request(key, seed)
    same(cut.forward("run", request), whole.forward("run", request))
    same(cut.forward_backward("run", 1, request), whole.forward_backward("run", 1, request))
    ours, theirs = (backend._runs["run"].accumulator for backend in (cut, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@examples
@given(
    keys=st.lists(st.sampled_from(sorted(LOSSES)), min_size=2, max_size=5),
    budget=st.sampled_from([40, 10_000]),
)
def test_runs_with_different_losses_in_one_pass_are_each_alone(keys, budget):
    names = [str(index) for index in range(len(keys))]
    together, alone = (backend_of(*names, budget=tokens) for tokens in (budget, 10_000))
    calls = [(name, 1, loss_request(key, int(name))) for name, key in zip(names, keys, strict=True)]
    outcomes = together.forward_backward_group(calls)
    for (name, seq, request), outcome in zip(calls, outcomes, strict=True):
        assert isinstance(outcome, LossOutcome)
        same(outcome, alone.forward_backward(name, seq, request))
        ours, theirs = (backend._runs[name].accumulator for backend in (together, alone))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key", ["ppo-both", "dpo", "soft"])
@pytest.mark.parametrize("backward", [False, True])
def test_scarce_memory_changes_nothing(key, backward):
    calm, scarce = backend_of("run"), backend_of("run")
    request = loss_request(key)
    compares = key != "soft"
    # Where there is a reference, every other pass is its own, and has no backward pass.
    faults = {1, 3} if backward and compares else {0, 2}
    with fault_at(MODEL.body, faults, backward=backward) as seen:
        ours = scarce.forward_backward("run", 1, request)
    assert seen.faults == 2
    same(ours, calm.forward_backward("run", 1, request))
    torch.testing.assert_close(
        scarce._runs["run"].accumulator, calm._runs["run"].accumulator, rtol=1e-9, atol=1e-9
    )


def test_a_pair_that_does_not_fit_fails_by_itself_and_says_so():
    backend = backend_of("run", budget=1)
    with (
        fault_at(MODEL.body, set(range(99)), backward=False),
        pytest.raises(TenSafeFault, match=r"2 rows of .* which the loss needs together") as caught,
    ):
        backend.forward("run", loss_request("dpo-given"))
    assert caught.value.detail.reason == "OUT_OF_MEMORY"


def test_forward_has_the_masks_of_the_next_backward_if_it_is_asked():
    backend = backend_of("run", lora={"dropout": 0.4})
    request = loss_request("cross_entropy")
    plain = backend.forward("run", request)
    for seq in (1, 2):
        masked = backend.forward("run", replace(request, dropout=True))
        backward = backend.forward_backward("run", seq, request)
        np.testing.assert_array_equal(masked.logprobs, backward.logprobs)
        assert not np.allclose(masked.logprobs, plain.logprobs)
    assert backend._runs["run"].window.backwards == 2


def test_the_window_combines_what_losses_define():
    backend = backend_of("run")
    outcomes = [backend.forward_backward("run", seq, loss_request("ppo", seq)) for seq in range(3)]
    step = backend.optim_step("run", StepRequest())
    weights = [m.weight for o in outcomes for m in o.metrics if m.name == "approx_kl"]
    kls = [metric(outcome, "approx_kl") for outcome in outcomes]
    assert metric(step, "approx_kl") == pytest.approx(np.average(kls, weights=weights))
    assert metric(step, "ratio_max") == max(metric(o, "ratio_max") for o in outcomes)
    assert metric(step, "ratio_min") == min(metric(o, "ratio_min") for o in outcomes)


def test_a_state_keeps_the_open_windows_metrics(tmp_path):
    backend = backend_of("run")
    backend.forward_backward("run", 1, loss_request("ppo"))
    backend.save_state("run", tmp_path, include_optimizer=True)
    backend.open_run("twin", settings(lora=LORA), tmp_path)
    for run in ("run", "twin"):
        backend.forward_backward(run, 2, loss_request("importance_sampling"))
    ours, theirs = (backend.optim_step(run, StepRequest()).metrics for run in ("twin", "run"))
    timed = {"compute_ms", "tokens_per_second"}
    assert [m for m in ours if m.name not in timed] == [m for m in theirs if m.name not in timed]


@pytest.mark.parametrize("what", BREAKS)
def test_a_plug_in_that_fails_fails_its_own_call_alone(what):
    backend, without = backend_of("a", "bad", "c"), backend_of("a", "bad", "c")
    bad = loss_request("linear")
    bad = replace(bad, loss="broken", reduction=None, options={"broken": what})
    bad.batch.inputs = {"wanted": -np.ones(len(bad.batch.input_tokens), np.float32)}
    calls = [("a", 1, loss_request("ppo")), ("bad", 1, bad), ("c", 1, loss_request("dpo"))]
    outcomes = backend.forward_backward_group(calls)
    fault = outcomes.pop(1)
    assert isinstance(fault, TenSafeFault)
    assert fault.detail.reason == "INTERNAL"
    assert "broken, a plug-in of the operator, failed" in str(fault)
    assert "own error" not in str(fault)
    clean = without.forward_backward_group([calls[0], calls[2]])
    for run, ours, theirs in zip("ac", outcomes, clean, strict=True):
        same(ours, theirs)
        accumulators = [each._runs[run].accumulator for each in (backend, without)]
        assert torch.equal(*accumulators)
    with pytest.raises(TenSafeFault) as caught:
        backend.optim_step("bad", StepRequest())
    assert caught.value.detail.reason == "WINDOW_POISONED"
    bad.batch.inputs["wanted"] *= -1
    backend.forward_backward("bad", 3, bad)
    assert backend.optim_step("bad", StepRequest()).applied


def test_an_infinite_ratio_is_that_calls_own_fault():
    backend, without = backend_of("a", "b"), backend_of("a", "b")
    bad = loss_request("importance_sampling")
    bad.batch.inputs["logprobs"][:] = -1e6
    outcomes = backend.forward_backward_group([("a", 1, loss_request("gspo")), ("b", 1, bad)])
    assert isinstance(outcomes[1], TenSafeFault)
    assert outcomes[1].detail.reason == "NON_FINITE_LOSS"
    clean = without.forward_backward("a", 1, loss_request("gspo"))
    same(outcomes[0], clean)
    assert torch.equal(*(each._runs["a"].accumulator for each in (backend, without)))


def test_a_reference_whose_files_are_damaged_is_its_own_calls_fault(other_adapter, tmp_path):
    for file in other_adapter.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    backend, without = backend_of("a", "b"), backend_of("a", "b")
    bad = loss_request("kl", reference=Reference("artifact_id", ArtifactWeights("art-x", tmp_path)))
    outcomes = backend.forward_backward_group([("a", 1, loss_request("gspo")), ("b", 1, bad)])
    assert isinstance(outcomes[1], TenSafeFault)
    assert outcomes[1].detail.reason == "CHECKSUM_MISMATCH"
    assert "art-x cannot be read" in str(outcomes[1])
    same(outcomes[0], without.forward_backward("a", 1, loss_request("gspo")))


def test_a_reference_of_another_model_is_refused(other_adapter):
    llama = freeze("llama", tiny_llama().double())
    backend = TorchBackend([MODEL, llama], token_budget=10_000)
    backend.open_run("run", replace(settings(), model_ref="llama"), None)
    request = loss_request("kl", reference=Reference("artifact_id", other_adapter))
    with pytest.raises(TenSafeFault, match="adapter of tiny") as caught:
        backend.forward("run", request)
    assert caught.value.detail.reason == "ARTIFACT_MISMATCH"


@pytest.mark.parametrize("key", ["ppo-both", "dpo", "gspo"])
def test_deterministic_runs_keep_their_bits(key):
    single = freeze("tiny", tiny_llama())
    bits = []
    for budget in (25, 10_000):
        backend = TorchBackend([single], token_budget=budget)
        backend.open_run("run", settings(deterministic=True, lora={"dropout": 0.2}), None)
        perturb(backend, "run")
        outcome = backend.forward_backward("run", 1, loss_request(key))
        values = [output.values.tobytes() for output in outcome.outputs.values()]
        bits.append((outcome.metrics, values, backend._runs["run"].accumulator.numpy().tobytes()))
    assert bits[0] == bits[1]
