"""A private call's clipped sum equals that of a loop over single examples in plain `peft`."""

from __future__ import annotations

import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.scarce_memory import fault_at
from parity.tiny_models import FAMILIES, Wide
from parity.tiny_runs import request_of, rows_of, settings
from privacy.private_runs import (
    SGD,
    TOKEN_SUM,
    clipped_sum,
    exact_model,
    example_gradients,
    furthest,
    open_private,
    private,
    private_request,
    unit_sum,
)

from workers.engine.engine import TorchBackend
from workers.operations import StepRequest

EXACT = 1e-12
LENGTHS = [5, 23, 9, 12, 1, 17, 11, 30]
MASKED = [2, 9, 0, 3, 0, 16, 4, 29]
ALONE = list(range(8))
FAMILY_NAMES = ["llama-gqa", "qwen3-tied", "gemma3-windows", "phi"]


@pytest.fixture(autouse=True, scope="module")
def float64_throughout():
    """`transformers` casts to float32 in places, whatever the model's type."""
    with Wide():
        yield


def reference(backend, name, rows, masked, units, bound, run_id="run", summed=False):
    """From a `peft` model with the run's adapter."""
    plain = PlainPeft(FAMILIES[name].build(), backend._runs[run_id])
    gradients = example_gradients(plain, rows, masked, summed)
    return clipped_sum(gradients, units, bound)


def bound_for_half(norms: list[float]) -> float:
    """Clips half of them."""
    ordered = sorted(norms)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def check(backend, name, rows, masked, units, bound, run_id="run", summed=False):
    expected, norms = reference(backend, name, rows, masked, units, bound, run_id, summed)
    run = backend._runs[run_id]
    assert furthest(run.adapter.named(unit_sum(backend, run_id)), expected) <= EXACT
    return norms


@pytest.fixture(scope="module")
def bound() -> float:
    """Of the examples below, half are clipped."""
    backend = TorchBackend([exact_model()], token_budget=10_000)
    open_private(backend)
    _, norms = reference(backend, "llama-gqa", rows_of(3, LENGTHS), MASKED, ALONE, 1.0)
    return bound_for_half(norms)


@pytest.mark.parametrize("token_budget", [30, 64, 10_000])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_units_of_one_example(name, token_budget):
    """Rows of unequal lengths, of which nothing is padded; passes of one row, of a few, of all."""
    backend = TorchBackend([exact_model(name)], token_budget=token_budget)
    linear = FAMILIES[name].linear
    open_private(backend, lora={"target_modules": linear}, max_grad_norm=1.0)
    rows = rows_of(3, LENGTHS)
    _, norms = reference(backend, name, rows, MASKED, ALONE, 1.0)
    bound = bound_for_half(norms)
    open_private(backend, lora={"target_modules": linear}, max_grad_norm=bound)
    backend.forward_backward("run", 1, private_request(rows, masked=MASKED))
    norms = check(backend, name, rows, MASKED, ALONE, bound)
    assert sum(norm > bound for norm in norms) == 4


@pytest.mark.parametrize("token_budget", [20, 64, 10_000])
@pytest.mark.parametrize(
    "units", [[0, 1, 0, 2, 1, 0, 3, 3], [0] * 8, [7, 3, 3, -1, 0, 7, -1, 7], [-1] * 7 + [0]]
)
def test_units_of_several_examples(units, token_budget, bound):
    """Their gradients are added, then clipped; in a budget of 20 no unit lies in one pass."""
    backend = TorchBackend([exact_model()], token_budget=token_budget)
    open_private(backend, max_grad_norm=bound)
    rows = rows_of(3, LENGTHS)
    backend.forward_backward("run", 1, private_request(rows, units, masked=MASKED))
    check(backend, "llama-gqa", rows, MASKED, units, bound)


def test_token_sums(bound):
    backend = TorchBackend([exact_model()], token_budget=50)
    open_private(backend, max_grad_norm=9 * bound)
    rows = rows_of(3, LENGTHS)
    request = private_request(rows, masked=MASKED, reduction=TOKEN_SUM)
    backend.forward_backward("run", 1, request)
    norms = check(backend, "llama-gqa", rows, MASKED, ALONE, 9 * bound, summed=True)
    assert 0 < sum(norm > 9 * bound for norm in norms) < 8


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_accumulated_calls_are_one_call(cut, bound):
    backend = TorchBackend([exact_model()], token_budget=40)
    open_private(backend, max_grad_norm=bound)
    rows = rows_of(3, LENGTHS)
    for part in (slice(0, cut), slice(cut, 8)):
        backend.forward_backward("run", 1, private_request(rows[part], masked=MASKED[part]))
    check(backend, "llama-gqa", rows, MASKED, ALONE, bound)


@pytest.mark.parametrize(
    ("units", "faults"),
    [(ALONE, {0, 2, 5, 9, 14, 20, 27, 35}), ([0, 1, 0, 2, 1, 0, 3, 3], {0, 2, 6})],
)
def test_activations_that_are_made_anew(units, faults, bound):
    """A row that runs out of memory makes those of its length and longer keep their layers' inputs
    only, and all begins anew; until that is so of all rows."""
    model = exact_model()
    backend = TorchBackend([model], token_budget=1)
    open_private(backend, max_grad_norm=bound)
    rows = rows_of(3, LENGTHS)
    with fault_at(model.body, faults, backward=True) as seen:
        backend.forward_backward("run", 1, private_request(rows, units, masked=MASKED))
    assert seen.faults == len(faults)
    check(backend, "llama-gqa", rows, MASKED, units, bound)


@pytest.mark.parametrize("token_budget", [45, 10_000])
def test_beside_other_runs_of_other_ranks(token_budget, bound):
    """Private and plain tenants in the same passes; none sees the others."""
    model = exact_model()
    backend = TorchBackend([model], token_budget=token_budget)
    ranks = {"one": 4, "two": 1, "three": 9}
    for seed, (name, rank) in enumerate(ranks.items()):
        open_private(backend, name, lora={"rank": rank}, seed=seed, max_grad_norm=bound)
    backend.open_run("plain", settings(lora={"rank": 3}, seed=9), None)
    rows = {name: rows_of(seed, LENGTHS) for seed, name in enumerate([*ranks, "plain"])}
    requests = {name: private_request(rows[name], masked=MASKED) for name in ranks}
    requests["plain"] = request_of(rows["plain"], masked=MASKED)
    requests["two"].batch.units = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).int().numpy()
    order = ["plain", *ranks]
    outcomes = backend.forward_backward_group([(name, 1, requests[name]) for name in order])
    alone = TorchBackend([model], token_budget=token_budget)
    alone.open_run("plain", settings(lora={"rank": 3}, seed=9), None)
    expected = alone.forward_backward("plain", 1, requests["plain"])
    assert outcomes[0].logprobs == pytest.approx(expected.logprobs, abs=1e-12)
    ours, theirs = unit_sum(backend, "plain"), unit_sum(alone, "plain")
    assert float((ours - theirs).norm() / theirs.norm()) <= EXACT
    for name in ranks:
        units = ALONE if name != "two" else [0, 0, 1, 1, 2, 2, 3, 3]
        check(backend, "llama-gqa", rows[name], MASKED, units, bound, run_id=name)


def test_an_update_is_the_sum_over_the_public_batch_size(bound):
    """By plain gradient descent at rate 1: however many units came, 5 is what is divided by."""
    backend = TorchBackend([exact_model()], token_budget=10_000)
    options = settings(optimizer=SGD)
    run = private(options, max_grad_norm=bound, expected_batch_size=5.0)
    backend.open_run("run", run, None)
    rows = rows_of(3, LENGTHS)
    expected, _ = reference(backend, "llama-gqa", rows, MASKED, ALONE, bound)
    adapter = backend._runs["run"].adapter
    before = {name: tensor.clone() for name, tensor in adapter.named().items()}
    backend.forward_backward("run", 1, private_request(rows, masked=MASKED))
    outcome = backend.optim_step("run", StepRequest(charged=True))
    for name, tensor in adapter.named().items():
        torch.testing.assert_close(before[name] - tensor, expected[name] / 5, rtol=0, atol=1e-14)
    norm = torch.cat([tensor.flatten() for tensor in expected.values()]).norm() / 5
    assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-12)
