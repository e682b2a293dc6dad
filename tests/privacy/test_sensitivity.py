"""One unit moves a step's sum by C at most, whatever it is, and nothing else by anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from parity.tiny_runs import VOCABULARY, rows_of, settings, tiny_llama
from privacy.private_runs import open_private, private, private_request, unit_sum

from workers.engine import computing
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.engine.magnitudes import squared_norms
from workers.engine.packing import pack
from workers.engine.privacy.clipping import clip_factors
from workers.operations import LossOutcome, PrivateMetrics, StepOutcome, StepRequest

BAD = VOCABULARY - 1
"""A token whose embedding is not a number, in the model below."""
LENGTHS = [5, 23, 9, 12, 3, 17, 11, 30]
BOUND = 0.05
"""Clips all of them."""


def model(dtype: torch.dtype) -> BaseModel:
    llama = tiny_llama().to(dtype)
    with torch.no_grad():
        llama.model.embed_tokens.weight[BAD] = torch.nan
    return freeze("tiny", llama)


MODELS = {
    "float64": model(torch.float64),
    "float32": model(torch.float32),
    "bfloat16": model(torch.bfloat16),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def base(request) -> BaseModel:
    return request.param


def clean_rows(seed: int, lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    """Without the bad token."""
    return [np.where(row == BAD, 3, row).astype(np.int32) for row in rows_of(seed, lengths)]


def with_bad_token(row: np.ndarray) -> np.ndarray:
    return np.concatenate([row[:1], [BAD], row[1:]]).astype(np.int32)


def sums(base: BaseModel, rows, *, units=None, budget: int = 60, bound: float = BOUND, **options):
    """The clipped sum of one call, and what it told."""
    backend = TorchBackend([base], token_budget=budget)
    open_private(backend, max_grad_norm=bound, lora=options.pop("lora", {}))
    outcome = backend.forward_backward("run", 1, private_request(rows, units, **options))
    return unit_sum(backend).double(), outcome


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bound", [1e-6, BOUND, 1e4])
def test_no_contribution_exceeds_the_bound(base, seed, bound):
    for row in clean_rows(seed, [7, 30]):
        found, _ = sums(base, [row], bound=bound)
        assert found.norm() <= bound
    grouped, _ = sums(base, clean_rows(seed), units=[0] * 8, bound=bound)
    assert grouped.norm() <= bound


@hypothesis(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-12, 1e12),
    spike=st.floats(0, 1e6),
    size=st.integers(1, 5000),
    bound=st.floats(1e-9, 1e9),
)
def test_whatever_the_numbers_are(seed, scale, spike, size, bound):
    """Norms in float32, of numbers of any kind: what is added is at most C in float64."""
    generator = torch.Generator().manual_seed(seed)
    gradients = scale * torch.randn(3, size, generator=generator)
    gradients[:, 0] += scale * spike
    factors = clip_factors(squared_norms(gradients).sqrt(), bound).float()
    assert ((factors[:, None] * gradients).double().norm(dim=1) <= bound).all()


def test_a_sum_of_millions_of_numbers_is_still_exact():
    """Float32 throughout would be off by up to 5e-4 here, and let that much more through."""
    gradients = torch.randn(4, 3_000_000, generator=torch.Generator().manual_seed(1))
    gradients[:, 0] = 3e3
    exact = gradients.double().norm(dim=1)
    assert (squared_norms(gradients).sqrt() / exact - 1).abs().max() < 5e-7
    assert (torch.linalg.vector_norm(gradients, dim=1) / exact - 1).abs().max() > 1e-5


@pytest.mark.parametrize("budget", [18, 30, 41, 10_000])  # other rows of a unit in one pass
@pytest.mark.parametrize("units", [None, [0, 1, 0, 2, 1, 0, 3, 3]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_neighbour_moves_the_sum_by_the_bound_at_most(base, budget, units, dropout):
    """Rows of one unit are taken out, zeroed or exchanged; passes and masks may be cut anew."""
    rows, lora = clean_rows(1), {"dropout": dropout}
    options = {"budget": budget, "lora": lora}
    own = list(range(8)) if units is None else units
    whole, told = sums(base, rows, units=units, **options)
    for unit in (0, 1, max(own)):
        zeroed = [-1 if each == unit else each for each in own]
        found, outcome = sums(base, rows, units=zeroed, **options)
        assert (whole - found).norm() <= BOUND * (1 + 1e-6)
        assert (whole - found).norm() > 0.9 * BOUND
        assert shape(outcome) == shape(told)
        left = [index for index, each in enumerate(own) if each != unit]
        remaining = None if units is None else [units[index] for index in left]
        removed, outcome = sums(base, [rows[i] for i in left], units=remaining, **options)
        torch.testing.assert_close(removed, found, rtol=0, atol=1e-6 * BOUND)
        assert shape(outcome).keys() == shape(told).keys()
        exchanged = [
            clean_rows(99, [LENGTHS[i]])[0] if each == unit else rows[i]
            for i, each in enumerate(own)
        ]
        other, outcome = sums(base, exchanged, units=units, **options)
        assert (other - found).norm() <= BOUND * (1 + 1e-6)
        assert shape(outcome) == shape(told)


def test_a_call_before_moves_the_sum_by_the_bound_at_most(base):
    """In how many pieces a drawn batch comes depends on who is in it; the masks do not."""
    rows = clean_rows(1)
    found = []
    for calls in ([rows[1:]], [rows[:1], rows[1:]]):
        backend = TorchBackend([base], token_budget=10_000)
        open_private(backend, lora={"dropout": 0.3}, max_grad_norm=BOUND)
        for seq, call in enumerate(calls, 1):
            backend.forward_backward("run", seq, private_request(call))
        found.append(unit_sum(backend))
    assert 0.9 * BOUND < (found[0] - found[1]).norm() <= BOUND * (1 + 1e-6)


@given(lengths=st.lists(st.integers(1, 200), min_size=2, max_size=20), out=st.integers(0, 19))
def test_a_documents_padding_depends_on_nobody_else(lengths, out):
    """Of attention on a CPU: over another padded length, a product adds up in another order. In
    bfloat16 that moved the others' gradients by 3% of C when a row was taken out."""

    def padded(own):
        buckets = pack(own, "cpu").buckets.members
        return [bucket.length for bucket in buckets for _ in range(bucket.count)]

    lengths.sort(reverse=True)
    out %= len(lengths)
    found = padded(lengths)
    assert all(length <= wide < length + 16 for length, wide in zip(lengths, found, strict=True))
    assert padded(lengths[:out] + lengths[out + 1 :]) == found[:out] + found[out + 1 :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_company_has_the_bits_of_attention_alone(dtype):
    lengths = [61, 44, 40, 33, 30, 30, 29, 12]
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 64), (2, 64), (2, 64)]

    def attended(own, tensors, grad):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = pack(own, "cpu").attend(None, *leaves, 0.125, None)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    tensors = [torch.randn(sum(lengths), *shape, generator=generator).to(dtype) for shape in shapes]
    grad = torch.randn(sum(lengths), 6, 64, generator=generator).to(dtype)
    whole = attended(lengths, tensors, grad)
    begin = 0
    for length in lengths:
        own = slice(begin, begin + length)
        alone = attended([length], [tensor[own] for tensor in tensors], grad[own])
        for ours, theirs in zip(whole, alone, strict=True):
            assert torch.equal(ours[own], theirs)
        begin += length


@pytest.mark.parametrize("lengths", [[3], [3, 60], [60] * 8])
def test_the_type_of_a_private_pass_does_not_depend_on_its_size(base, monkeypatch, lengths):
    seen = []
    adapters = computing.PassAdapters

    def spied(segments, dtype, *rest, **options):
        seen.append(dtype)
        return adapters(segments, dtype, *rest, **options)

    monkeypatch.setattr(computing, "PassAdapters", spied)
    sums(base, clean_rows(1, lengths), budget=10_000)
    # Of the last pass: what came before were measurements.
    assert seen[-1] == base.dtype


def shape(outcome: LossOutcome) -> dict[str, object]:
    """What an outcome's form is, apart from the caller's own token count."""
    return {m.name: m.combine for m in outcome.metrics} | dict(outcome.outputs)


def test_the_same_unit_twice_counts_once(base):
    rows = clean_rows(1, [9, 9])
    once, _ = sums(base, rows[:1])
    twice, _ = sums(base, [rows[0], rows[0]], units=[0, 0])
    apart, _ = sums(base, [rows[0], rows[0]])
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-6 * BOUND)
    assert apart.norm() > 1.99 * BOUND


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("units", [None, [0, 1, 0, 2, 1, 0, 3, 3]])
def test_a_unit_that_is_not_finite_adds_nothing_and_is_no_error(base, budget, units):
    rows = clean_rows(1)
    broken = [*rows[:3], with_bad_token(rows[3]), *rows[4:]]
    own = list(range(8)) if units is None else units
    without = [-1 if each == own[3] else each for each in own]
    expected, told = sums(base, broken, units=without, budget=budget)
    found, outcome = sums(base, broken, units=units, budget=budget)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * BOUND)
    assert outcome == told


def train(rows: list[np.ndarray], *, raw: bool = False, **options) -> list[object]:
    """All that a step tells, as the kinds of its parts."""
    backend = TorchBackend([MODELS["float32"]], token_budget=60)
    metrics = PrivateMetrics.RAW_TO_OWNER if raw else PrivateMetrics.PRIVATE
    run = private(settings(), noise_multiplier=1.0, test_seed=3, metrics=metrics, **options)
    backend.open_run("run", run, None)
    outcomes: list[object] = []
    if rows:
        outcomes.append(backend.forward_backward("run", 1, private_request(rows)))
    outcomes.append(backend.optim_step("run", StepRequest(charged=True)))
    return outcomes


@pytest.mark.parametrize("lost", [None, 10.0])
def test_whatever_the_data_a_step_has_one_form(lost):
    rows = clean_rows(2)
    data = {
        "usual": rows,
        "one": rows[:1],
        "all broken": [with_bad_token(row) for row in rows],
        "repeated": [rows[0]] * 8,
    }
    forms = {}
    for name, batch in data.items():
        outcome, step = train(batch, loss_noise_multiplier=lost)
        assert isinstance(step, StepOutcome)
        assert all(np.isfinite(metric.value) for metric in step.metrics)
        forms[name] = (
            shape(outcome),
            [(m.name, m.combine, m.weight) for m in step.metrics],
            (step.step, step.applied, step.learning_rate),
            (step.release.noise_applied, step.release.num_clipped),
            step.release.noised_loss is None,
        )
    assert len({repr(form) for form in forms.values()}) == 1
    (empty,) = train([], loss_noise_multiplier=lost)
    assert [(m.name, m.combine, m.weight) for m in empty.metrics] == forms["usual"][1]


def test_a_plain_tenants_numbers_do_not_change_beside_a_broken_unit():
    """And the other way round: private rows beside a plain run that is not finite."""
    base = MODELS["float32"]
    rows = clean_rows(1)
    broken = [with_bad_token(rows[0]), *rows[1:]]
    plain = settings(lora={"rank": 3}, seed=9)
    found = []
    for batch in (broken, rows[1:]):
        backend = TorchBackend([base], token_budget=10_000)
        open_private(backend, max_grad_norm=BOUND)
        backend.open_run("plain", plain, None)
        entries = [("run", 1, private_request(batch)), ("plain", 1, private_request(rows))]
        outcomes = backend.forward_backward_group(entries)
        assert all(isinstance(outcome, LossOutcome) for outcome in outcomes)
        found.append((unit_sum(backend), unit_sum(backend, "plain")))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    backend = TorchBackend([base], token_budget=10_000)
    open_private(backend, max_grad_norm=BOUND)
    backend.open_run("plain", plain, None)
    entries = [("run", 1, private_request(rows[1:])), ("plain", 1, private_request(broken))]
    _, failed = backend.forward_backward_group(entries)
    assert failed.detail.reason == "NON_FINITE_LOSS"
    torch.testing.assert_close(unit_sum(backend), found[1][0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("multiplier", [0.0, 5.0])
def test_accumulated_calls_add_up(base, multiplier):
    """Each call's sum is its own; the window's is theirs."""
    rows = clean_rows(1)
    backend = TorchBackend([base], token_budget=60)
    open_private(backend, max_grad_norm=BOUND, noise_multiplier=multiplier)
    for part in (rows[:3], rows[3:]):
        backend.forward_backward("run", 1, private_request(part))
    expected, _ = sums(base, rows)
    torch.testing.assert_close(unit_sum(backend).double(), expected, rtol=0, atol=1e-6 * BOUND)
