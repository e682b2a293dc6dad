"""Every loss against an independent float64 NumPy: value, gradient by the logits, metrics, outputs.

The head is the identity, so that hidden states are logits and their gradient is the logits'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from unit.workers.numpy_losses import Answer, Case, answer

from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from workers.engine import head
from workers.engine.batches import check_batch
from workers.engine.objectives import Objective, resolve
from workers.engine.scoring import Portion, PortionLoss, backward, score
from workers.losses import LossRegistry
from workers.operations import Batch, LossRequest, Reference

LOSSES = LossRegistry()
VOCABULARY = 13
LENGTHS = [3, 1, 5, 2, 4, 2]
EXACT = 1e-9

POLICY: list[tuple[str, dict[str, Any]]] = [
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low": 0.5, "clip_high": 1.05}),
    ("cispo", {}),
    ("cispo", {"clip_low": 0.9, "clip_high": 1.1}),
    ("dro", {}),
    ("dro", {"beta": 0.7}),
    ("gspo", {}),
    ("gspo", {"clip_low": 0.6, "clip_high": 1.3}),
]
REGULARISED = [
    (name, {**options, "entropy_coef": 0.3, "kl_coef": 0.2})
    for name, options in POLICY
    if name != "dro" or options
]
TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"label_smoothing": 1.0}),
    *POLICY,
    *REGULARISED,
    ("ppo", {"entropy_coef": 0.0, "kl_coef": 0.0}),
    ("kl", {}),
    ("kl", {"direction": "forward"}),
]
PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {}),
    ("dpo", {"beta": 2.0, "label_smoothing": 0.2}),
    ("dpo", {"reference": "none"}),
    ("dpo", {"given": True}),
]


def case_of(name: str, seed: int, width: int = 0, *, given: bool = False) -> Case:
    """Random positions; ratios on both sides of every clip, advantages of both signs."""
    rng = np.random.default_rng([seed, width])
    size = sum(LENGTHS)
    shape = (size, width) if width else (size,)
    case = Case(
        logits=2 * rng.normal(size=(size, VOCABULARY)),
        reference=2 * rng.normal(size=(size, VOCABULARY)),
        lengths=LENGTHS,
        targets=rng.integers(0, VOCABULARY, shape),
        # Exact in float32, which is what a batch has.
        weights=rng.choice([0.25, 1.0, 1.5], shape),
        inputs={},
    )
    if name in dict(POLICY):
        logs = case.logits - np.log(np.exp(case.logits).sum(1, keepdims=True))
        own = np.take_along_axis(logs, case.targets[:, None], 1)[:, 0]
        case.inputs["logprobs"] = _single(own + rng.normal(0, 0.3, size))
        case.inputs["advantages"] = _single(rng.normal(size=size))
    if name == "linear":
        case.inputs["gradients"] = _single(rng.normal(size=shape))
    if given:
        case.inputs["reference_logprobs"] = _single(rng.normal(-2, 1, size))
    return case


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def request_of(
    name: str, options: Mapping[str, Any], reduction: str | None, case: Case
) -> LossRequest:
    """The same as a request: one input token for each position."""
    reference = Reference(options["reference"]) if "reference" in options else None
    own = {key: value for key, value in options.items() if key not in ("reference", "given")}
    batch = Batch(
        offsets=np.cumsum([0, *case.lengths], dtype=np.int64),
        input_tokens=np.zeros(sum(case.lengths), np.int32),
        target_tokens=case.targets.astype(np.int32),
        weights=case.weights.astype(np.float32),
        inputs={key: values.astype(np.float32) for key, values in case.inputs.items()},
    )
    wanted = None if reduction is None else Reduction(reduction)
    return LossRequest(batch, name, wanted, own, reference)


def computed(
    name: str, options: Mapping[str, Any], reduction: str | None, case: Case
) -> tuple[Objective, PortionLoss, float, torch.Tensor]:
    """What the engine makes of a case: the denominator and the gradient by the logits too."""
    request = request_of(name, options, reduction, case)
    objective = resolve(request, LOSSES, lambda artifact: pytest.fail("no artifact is named"))
    batch = check_batch(request, objective.loss, objective.reduction, VOCABULARY, 64)
    identity = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False, dtype=torch.float64)
    identity.requires_grad_(False).weight.copy_(torch.eye(VOCABULARY))
    logits = torch.from_numpy(case.logits).requires_grad_()
    portion = Portion(
        call=0,
        objective=objective,
        batch=batch,
        rows=list(range(len(case.lengths))),
        sources=batch.places,
        counts=case.lengths,
        places=slice(0, batch.scored),
        reference_SD=torch.from_numpy(case.reference) if objective.compares else None,
    )
    (found,) = score(identity, logits, [portion])
    backward([found])
    return objective, found, batch.denominator, logits.grad


def check(name: str, options: Mapping[str, Any], reduction: str, case: Case) -> Answer:
    objective, found, denominator, slopes = computed(name, options, reduction, case)
    expected = answer(name, dict(options), reduction, case)
    assert found.loss.item() / denominator == pytest.approx(expected.loss, abs=EXACT)
    np.testing.assert_allclose(slopes / denominator, expected.slopes, rtol=0, atol=EXACT)
    combines = {metric.name: metric.combine for metric in objective.loss.card.metrics}
    assert found.metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.items():
        total, count = found.metrics[metric]
        ours = total.item() / (count if combines[metric] == "mean" else 1)
        assert ours == pytest.approx(value, abs=EXACT), metric
    assert found.outputs.keys() - {"logprobs"} == expected.outputs.keys()
    for output, values in expected.outputs.items():
        np.testing.assert_allclose(found.outputs[output], values, rtol=0, atol=EXACT)
    return expected


def named(cases: list[tuple[str, dict[str, Any]]]) -> Any:
    ids = ["-".join([name, *(f"{k}={v}" for k, v in opts.items())]) for name, opts in cases]
    return pytest.mark.parametrize(("name", "options"), cases, ids=ids)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@named(TOKENS)
def test_known_answers(monkeypatch, name, options, reduction):
    monkeypatch.setattr(head, "_CHUNK_LOGITS_CPU", 1)
    for seed in range(5):
        check(name, options, reduction, case_of(name, seed))


@pytest.mark.parametrize("reduction", ["sequence_mean", "sum"])
@named(PAIRS)
def test_known_answers_of_pairs(name, options, reduction):
    for seed in range(5):
        case = case_of(name, seed, given="given" in options)
        expected = check(name, options, reduction, case)
        assert expected.metrics["accuracy"] not in (0, 1) or seed


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_soft_targets(reduction, smoothing):
    options = {"label_smoothing": smoothing}
    for seed in range(5):
        check("cross_entropy", options, reduction, case_of("cross_entropy", seed, width=4))


def test_soft_targets_of_the_whole_vocabulary_are_torchs_cross_entropy():
    case = case_of("cross_entropy", 0, width=VOCABULARY)
    case.targets[:] = np.arange(VOCABULARY)
    case.weights[:] = np.random.default_rng(3).dirichlet(np.ones(VOCABULARY), len(case.targets))
    case.weights = _single(case.weights)
    _, found, denominator, slopes = computed(
        "cross_entropy", {"label_smoothing": 0.2}, "token_mean", case
    )
    logits = torch.from_numpy(case.logits).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(case.weights), label_smoothing=0.2, reduction="sum"
    )
    theirs.backward()
    # torch smooths each position's weights; ours add up to 1 to float32's precision only.
    assert found.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(slopes, logits.grad, rtol=0, atol=1e-6)
    assert denominator == pytest.approx(len(case.targets), abs=1e-5)


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("options", [{}, {"value": 0.25}])
def test_linear(width, options):
    for seed in range(3):
        check("linear", options, "sum", case_of("linear", seed, width=width))


def test_targets_of_weight_0_do_not_count_and_may_be_filler():
    case = case_of("cross_entropy", 1, width=3)
    case.weights[:, 1] = 0
    narrow = case_of("cross_entropy", 1, width=3)
    narrow.targets, narrow.weights = case.targets[:, [0, 2]], case.weights[:, [0, 2]]
    case.targets[:, 1] = -100
    _, found, _, slopes = computed("cross_entropy", {}, "sum", case)
    expected = answer("cross_entropy", {}, "sum", narrow)
    assert found.loss.item() == pytest.approx(expected.loss, abs=EXACT)
    np.testing.assert_allclose(slopes, expected.slopes, rtol=0, atol=EXACT)
    assert (found.outputs["logprobs"][:, 1] == 0).all()


@named([*TOKENS, *PAIRS, ("linear", {})])
def test_the_gradients_of_the_answers_are_those_of_their_values(name, options):
    """By differences: what the engine is held to is right about itself."""
    if name in ("cispo", "gspo"):
        pytest.skip("its gradient is by design not its value's")
    case = case_of(name, 7, given="given" in options)
    reduction = "sum" if name == "linear" else "sequence_mean"
    expected = answer(name, dict(options), reduction, case)
    rng = np.random.default_rng(2)
    for _ in range(5):
        direction = rng.normal(size=case.logits.shape)
        values = []
        for sign in (1, -1):
            moved = Case(**{**vars(case), "logits": case.logits + sign * 1e-6 * direction})
            values.append(answer(name, dict(options), reduction, moved).loss)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(float((expected.slopes * direction).sum()), abs=1e-7)


@named([*TOKENS, *PAIRS])
def test_the_defaults_are_the_published_ones(name, options):
    """Of reductions too: the mean over tokens, and over pairs where there are pairs."""
    if options and "given" not in options:
        return
    case = case_of(name, 3, given="given" in options)
    _, found, denominator, _ = computed(name, options, None, case)
    reduction = "sequence_mean" if name == "dpo" else "token_mean"
    expected = answer(name, dict(options), reduction, case)
    assert found.loss.item() / denominator == pytest.approx(expected.loss, abs=EXACT)


@pytest.mark.parametrize(
    ("name", "options", "reason", "says"),
    [
        ("pp0", {}, "UNSUPPORTED_OPTION", "no loss 'pp0'"),
        ("ppo", {"clip": 1.0}, "UNSUPPORTED_OPTION", "no option 'clip'"),
        ("ppo", {"clip_low": 1.1}, "INVALID_ARGUMENT", "clip_low of ppo must be from 0 to 1"),
        ("ppo", {"clip_high": float("nan")}, "INVALID_ARGUMENT", "clip_high"),
        ("ppo", {"clip_high": "big"}, "INVALID_ARGUMENT", "must be a number"),
        ("ppo", {"clip_high": True}, "INVALID_ARGUMENT", "must be a number"),
        ("dpo", {"beta": 0.0}, "INVALID_ARGUMENT", "beta"),
        ("kl", {"direction": "sideways"}, "INVALID_ARGUMENT", "reverse, forward"),
        ("ppo", {"reference": "base"}, "UNSUPPORTED_OPTION", "kl_coef only"),
        ("kl", {"reference": "none"}, "UNSUPPORTED_OPTION", "cannot do without"),
        ("cross_entropy", {"reference": "base"}, "UNSUPPORTED_OPTION", "compares with none"),
    ],
)
def test_what_is_wrong_is_named(name, options, reason, says):
    case = case_of(name, 0)
    with pytest.raises(TenSafeFault, match=says) as caught:
        computed(name, options, None, case)
    assert caught.value.detail.reason == reason
    assert caught.value.detail.code == "INVALID_ARGUMENT"
    assert caught.value.detail.violations


def test_a_reference_beside_its_log_probabilities_is_refused():
    with pytest.raises(TenSafeFault, match="instead; leave one of them out"):
        computed("dpo", {"reference": "base"}, None, case_of("dpo", 0, given=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"advantages": None}, "ppo needs the loss input 'advantages'"),
        ({"advantage": np.ones(17)}, "'advantage' is unknown to ppo"),
        ({"logprobs": np.full(17, np.nan)}, "logprobs is NaN or infinite"),
        ({"logprobs": np.zeros((17, 2))}, r"logprobs must be float32 \[17\]"),
    ],
)
def test_wrong_inputs_are_named(change, says):
    case = case_of("ppo", 0)
    case.inputs = {k: v for k, v in (case.inputs | change).items() if v is not None}
    with pytest.raises(TenSafeFault, match=says) as caught:
        computed("ppo", {}, None, case)
    assert caught.value.detail.reason == "INVALID_BATCH"
    assert caught.value.detail.violations


def test_a_mean_takes_no_negative_weights_and_a_sum_does():
    case = case_of("ppo", 0)
    case.weights[2] = -1.0
    for reduction in ("token_mean", "sequence_mean"):
        with pytest.raises(TenSafeFault, match="negative"):
            computed("ppo", {}, reduction, case)
    check("ppo", {}, "sum", case)


def test_an_odd_datum_and_one_without_a_scored_token_are_no_pairs():
    case = case_of("dpo", 0)
    case.weights[:3] = 0
    with pytest.raises(TenSafeFault, match="datum 0 has no scored token"):
        computed("dpo", {}, None, case)
    case = case_of("dpo", 0)
    case.lengths = [*LENGTHS[:-2], LENGTHS[-2] + LENGTHS[-1]]
    with pytest.raises(TenSafeFault, match="the batch has 5"):
        computed("dpo", {}, None, case)


def test_the_token_mean_of_pairs_is_refused():
    with pytest.raises(TenSafeFault, match="has no reduction 'token_mean'"):
        computed("dpo", {}, "token_mean", case_of("dpo", 0))
