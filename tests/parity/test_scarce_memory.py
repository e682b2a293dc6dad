"""Splitting, accumulating and running out of memory leave the gradient what it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from parity import exhausted_process
from parity.group_members import SGD, Member, bits, entries, open_all, runs
from parity.scarce_memory import Exhausted, Held, capacity, fault_at
from parity.tiny_models import GATED
from parity.tiny_runs import lora, metric, perturb, request_of, rows_of, settings, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.backend import NoisedFault
from workers.engine import optimizers, updates
from workers.engine.base_model import freeze
from workers.engine.budget import TokenBudget
from workers.engine.engine import TorchBackend
from workers.engine.lora import PassAdapters, Segment
from workers.engine.packing import pack
from workers.engine.products import SegmentLoop
from workers.engine.run import Run
from workers.operations import (
    LossOutcome,
    PrivacySettings,
    Reduction,
    StepOutcome,
    StepRequest,
)

EXACT = freeze("tiny", tiny_llama().double())
"""In float64 the order of sums is next to nothing, and anything counted twice stands out."""
SINGLE = freeze("tiny", tiny_llama())
LENGTHS = [5, 30, 9, 22, 14, 1]
examples = hypothesis(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
MEMBERS = [
    Member(1, {"rank": 4, "dropout": 0.3}, {}, Reduction.SUM, (9, 14, 3), 0.8),
    Member(2, {"rank": 1, "target_modules": GATED}, {}, Reduction.TOKEN_MEAN, (21,), 0.5),
    Member(3, {"rank": 9, "dropout": 0.1}, {}, Reduction.TOKEN_MEAN, (17, 2, 8, 8), 1.0),
]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def run_of(budget: int, **options) -> TorchBackend:
    backend = TorchBackend([EXACT], token_budget=budget)
    backend.open_run("run", settings(**options), None)
    perturb(backend, "run")
    return backend


@examples
@given(
    parts=st.permutations(range(len(LENGTHS))).flatmap(
        lambda order: st.integers(1, len(order) - 1).map(
            lambda cut: (sorted(order[:cut]), sorted(order[cut:]))
        )
    ),
    budget=st.integers(1, 90),
)
def test_accumulated_calls_of_any_lengths_are_one_call(parts, budget):
    rows = rows_of(8, LENGTHS)
    whole, split = run_of(10_000), run_of(budget, accumulation_steps=2)
    whole.forward_backward("run", 1, request_of(rows, masked=0))
    for part in parts:
        request = request_of([rows[index] for index in part], masked=0)
        split.forward_backward("run", 1, request)
        if part is parts[0]:
            split.optim_step("run", StepRequest())
    ours, theirs = split._runs["run"], whole._runs["run"]
    close(ours.accumulator, theirs.accumulator)
    assert ours.window.denominator == theirs.window.denominator == sum(LENGTHS)
    assert ours.window.loss_sum == pytest.approx(theirs.window.loss_sum, rel=1e-12)
    steps = [backend.optim_step("run", StepRequest()) for backend in (split, whole)]
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-12)


@examples
@given(
    fault=st.integers(0, 7),
    backward=st.booleans(),
    budget=st.sampled_from([1, 25, 40, 10_000]),
    before=st.booleans(),
)
def test_an_allocators_error_at_any_pass_counts_nothing_twice(fault, backward, budget, before):
    backend, calm = open_all(EXACT, MEMBERS, budget), open_all(EXACT, MEMBERS)
    if before:
        for each in (backend, calm):
            each.forward_backward_group(entries(MEMBERS, call=1))
    with fault_at(EXACT.body, {fault}, backward=backward) as seen:
        outcomes = backend.forward_backward_group(entries(MEMBERS))
    expected = calm.forward_backward_group(entries(MEMBERS))
    assert seen.faults == (fault < len(seen.tokens))
    ours_and_theirs = zip(runs(backend, MEMBERS).items(), outcomes, expected, strict=True)
    for (run, ours), outcome, own in ours_and_theirs:
        theirs = calm._runs[run]
        assert isinstance(outcome, LossOutcome)
        np.testing.assert_allclose(outcome.logprobs, own.logprobs, rtol=0, atol=1e-9)
        close(ours.accumulator, theirs.accumulator)
        assert ours.window.denominator == theirs.window.denominator
        assert ours.window.tokens == theirs.window.tokens
        assert ours.window.loss_sum == pytest.approx(theirs.window.loss_sum, rel=1e-12)
        assert ours.backwards == theirs.backwards == 1 + before
        assert metric(outcome, "grad_norm") == pytest.approx(metric(own, "grad_norm"), rel=1e-12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fault", [0, 1, 2])
def test_the_budget_halves_when_a_pass_of_several_rows_does_not_fit(fault, backward):
    # Longest first: 30, 22 + 14, 9 + 5 + 1.
    backend = run_of(36)
    request = request_of(rows_of(8, LENGTHS), masked=0)
    budget = backend._budgets["tiny"]
    with fault_at(EXACT.body, {fault}, backward=backward) as seen:
        backend.forward_backward("run", 1, request)
    assert seen.faults == 1
    assert seen.tokens[: fault + 1] == [30, 36, 15][: fault + 1]
    # The first is one row: less company would not help it, and others have less than it.
    assert budget.tokens == [36, 18, 7][fault]
    assert seen.tokens[fault + 1 :] == [[30, 22, 29], [30, 22, 14, 15], [30, 22, 14, 9, 6]][fault]
    assert sum(seen.tokens[fault + 1 :]) == sum(LENGTHS)


def test_forward_halves_too_and_changes_nothing():
    backend = run_of(10_000)
    request = request_of(rows_of(8, LENGTHS), masked=0)
    expected = backend.forward("run", request)
    with fault_at(EXACT.body, {0, 2}, backward=False) as seen:
        outcome = backend.forward("run", request)
    # The halved budget of 40 gives 30 + 9, whose fault halves it again.
    assert seen.faults == 2
    np.testing.assert_allclose(outcome.logprobs, expected.logprobs, rtol=0, atol=1e-9)
    assert backend._budgets["tiny"].tokens == 18
    with (
        fault_at(EXACT.body, set(range(99)), backward=False),
        pytest.raises(TenSafeFault) as caught,
    ):
        backend.forward("run", request)
    assert caught.value.detail.reason == "OUT_OF_MEMORY"
    assert backend._runs["run"].accumulator is None
    backend.forward_backward("run", 1, request)
    assert backend.optim_step("run", StepRequest()).applied


def kept_bytes(length: int) -> int:
    """What a pass of one row keeps."""
    member = long_row(length)
    with capacity(SINGLE.body) as seen:
        open_all(SINGLE, [member]).forward_backward_group(entries([member]))
    return seen.most_bytes


def long_row(length: int, dropout: float = 0.2) -> Member:
    lora = {"rank": 4, "dropout": dropout}
    return Member(7, lora, {}, Reduction.TOKEN_MEAN, (length,), 1.0)


def test_a_row_that_does_not_fit_makes_its_activations_anew_and_keeps_its_bits():
    members = [long_row(60), long_row(9)]
    backend, calm = open_all(SINGLE, members), open_all(SINGLE, members, 60)
    with capacity(SINGLE.body, 0.6 * kept_bytes(60)) as seen:
        outcomes = backend.forward_backward_group(entries(members))
    assert seen.tokens == [69, 60, 60, 9]
    assert seen.faults == 2
    expected = calm.forward_backward_group(entries(members))
    assert bits(backend, outcomes, ["0", "1"]) == bits(calm, expected, ["0", "1"])


@pytest.mark.parametrize("length", [60, 700])
def test_activations_that_are_made_anew_are_not_held_meanwhile(length):
    """Not only those that autograd keeps: nothing else may hold what attention computes."""
    model = freeze("long", tiny_llama(max_position_embeddings=1024))
    ids, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    adapter = model.new_adapter(lora(rank=4, dropout=0.1))
    held = []
    for frugal in (False, True):
        segment = Segment(0, length, adapter)
        adapters = PassAdapters([segment], torch.float32, SegmentLoop(), trains=True)
        with Held() as memory, model.carrying(adapters):
            output = model.hidden(ids, positions, pack([length], "cpu"), frugal=frugal)
            held.append(memory.bytes)
        del output
    row = length * model.layers["model.layers.0.self_attn.q_proj"].in_features * 4
    # One layer's scores, in memory that the next one uses again; there are none of long documents.
    scores = 4 * 64**2 * 4 if length < 64 else 0
    # The embeddings, each layer's output, the last norm's output; rotations and a mask.
    assert held[1] < 7 * row + scores
    assert held[0] > 20 * row


@pytest.mark.parametrize("scarce", [0, 1], ids=["first_update", "second_update"])
def test_updates_that_find_no_memory_leave_each_run_what_it_was(scarce):
    kinds = [{}, {"beta1": 0.5}, SGD]
    members = [Member(n, {"rank": 2}, own, Reduction.SUM, (3,), 1.0) for n, own in enumerate(kinds)]
    names = ["0", "1", "2"]
    steps, failed = [(name, StepRequest()) for name in names], 0
    for first in range(300):
        backend = open_all(SINGLE, members)
        for call in range(scarce):
            backend.forward_backward_group(entries(members, call=call))
            backend.optim_step_group(steps)
        backend.forward_backward_group(entries(members, call=scarce))
        before = [_state(run) for run in runs(backend, members).values()]
        with Exhausted(first):
            outcomes = backend.optim_step_group(steps)
        for run, was, outcome in zip(
            runs(backend, members).values(), before, outcomes, strict=True
        ):
            if isinstance(outcome, TenSafeFault):
                failed += 1
                assert outcome.detail.reason == "OUT_OF_MEMORY"
                assert _state(run) == was
                assert run.window.step == scarce
            else:
                assert run.window.step == scarce + 1
                assert _state(run) != was
        if not any(isinstance(outcome, TenSafeFault) for outcome in outcomes):
            break
    assert first < 299
    assert failed > first > 1


def test_a_first_update_whose_moments_find_no_memory_fails_alone(monkeypatch):
    members = [Member(n, {"rank": 2}, {}, Reduction.SUM, (3,), 1.0) for n in range(3)]
    backend, without = (open_all(SINGLE, members) for _ in range(2))
    own = optimizers._moments

    def scarce(optimizer):
        if optimizer is backend._runs["1"].optimizer:
            raise MemoryError
        return own(optimizer)

    monkeypatch.setattr(optimizers, "_moments", scarce)
    for each in (backend, without):
        each.forward_backward_group(entries(members))
    before = _state(backend._runs["1"])
    outcomes = backend.optim_step_group([(name, StepRequest()) for name in "012"])
    without.optim_step_group([(name, StepRequest()) for name in "02"])
    assert isinstance(outcomes[1], TenSafeFault)
    assert outcomes[1].detail.reason == "OUT_OF_MEMORY"
    assert _state(backend._runs["1"]) == before
    for name in "02":
        assert _state(backend._runs[name]) == _state(without._runs[name])


def test_a_private_step_of_nothing_that_finds_no_memory_fails_alone_and_is_paid(monkeypatch):
    """It fails before there is noise, but only because nothing was added."""
    backend = open_all(SINGLE, [Member(0, {"rank": 2}, {}, Reduction.SUM, (3,), 1.0)])
    private = replace(settings(), privacy=PrivacySettings(0.5, 1.0, 2.0))
    backend.open_run("private", private, None)
    backend.forward_backward_group(entries([Member(0, {}, {}, Reduction.SUM, (3,), 1.0)]))
    weights, own = backend._runs["private"].adapter.weights, torch.zeros_like

    def scarce(like, **options):
        if like is weights:
            raise MemoryError
        return own(like, **options)

    monkeypatch.setattr(updates.torch, "zeros_like", scarce)
    applied, failed = backend.optim_step_group(
        [("0", StepRequest()), ("private", StepRequest(charged=True))]
    )
    assert isinstance(applied, StepOutcome)
    assert isinstance(failed, NoisedFault)
    assert failed.detail.reason == "OUT_OF_MEMORY"


def test_a_kernel_that_fails_fails_those_that_it_was_called_for(monkeypatch):
    members = [
        Member(n, {"rank": 2}, own, Reduction.SUM, (3,), 1.0) for n, own in enumerate([{}, SGD])
    ]
    backend = open_all(SINGLE, members)

    def fail(_ready):
        raise MemoryError

    monkeypatch.setitem(optimizers._STEPS, "sgd", fail)
    backend.forward_backward_group(entries(members))
    before = _state(backend._runs["1"])
    applied, failed = backend.optim_step_group([(name, StepRequest()) for name in "01"])
    assert isinstance(applied, StepOutcome)
    assert backend._runs["0"].window.step == 1
    assert isinstance(failed, TenSafeFault)
    assert failed.detail.reason == "OUT_OF_MEMORY"
    assert _state(backend._runs["1"]) == before
    assert backend._runs["1"].window.step == 0


def _state(run: Run) -> dict[str, bytes]:
    tensors = {"weights": run.adapter.weights.detach(), **run.optimizer.state()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("budget", [200, 1000], ids=["by_itself", "beside_others"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_that_does_not_fit_at_all_fails_alone(place, budget):
    model = freeze("tiny", tiny_llama(max_position_embeddings=256))
    members = [long_row(5), long_row(4, dropout=0.0)]
    with capacity(model.body) as enough:
        open_all(model, members, budget).forward_backward_group(entries(members))
    members.insert(place, long_row(200))
    others = [index for index in range(3) if index != place]
    backend, without = open_all(model, members, budget), open_all(model, members, budget)
    with capacity(model.body, 1.01 * enough.most_bytes) as seen:
        outcomes = backend.forward_backward_group(entries(members))
        clean = without.forward_backward_group(entries(members, others))
    assert seen.faults
    assert isinstance(outcomes[place], TenSafeFault)
    assert outcomes[place].detail.reason == "OUT_OF_MEMORY"
    assert "200 tokens" in str(outcomes[place])
    assert [backend._budgets["tiny"].tokens, without._budgets["tiny"].tokens] == [budget, budget]
    names = [str(index) for index in others]
    ours = [outcomes[index] for index in others]
    assert bits(backend, ours, names) == bits(without, clean, names)
    # Its window is poisoned, and the next one is as good as new.
    assert backend._runs[str(place)].accumulator is None
    with pytest.raises(TenSafeFault, match="forward_backward of this"):
        backend.optim_step(str(place), StepRequest())
    again = backend.forward_backward_group(entries(members, [place]))
    expected = without.forward_backward_group(entries(members, [place]))
    assert bits(backend, again, [str(place)]) == bits(without, expected, [str(place)])


def test_the_budget_is_whole_again_with_the_memory_and_deterministic_runs_never_notice(monkeypatch):
    monkeypatch.setattr(TokenBudget, "fixed", 30)
    members = [Member(n, {"rank": 2}, {}, Reduction.TOKEN_MEAN, (20, 20), 1.0) for n in (1, 2)]
    backend, calm = open_all(SINGLE, members, 80), open_all(SINGLE, members, 80)
    fixed = settings(lora={"dropout": 0.1}, deterministic=True)
    for each in (backend, calm):
        each.open_run("fixed", fixed, None)
        perturb(each, "fixed")
    budget = backend._budgets["tiny"]
    with fault_at(SINGLE.body, {0}, backward=True):
        backend.forward_backward_group(entries(members))
    assert budget.tokens == 40
    sizes = []
    for call in range(2, 60):
        with capacity(SINGLE.body) as seen:
            backend.forward_backward_group(entries(members, call=call))
        sizes.append(max(seen.tokens))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1], budget.tokens) == (40, 80, 80)
    request = request_of(rows_of(8, LENGTHS), masked=0)
    budget.tokens = 10
    with capacity(SINGLE.body) as seen:
        outcomes = [each.forward_backward("fixed", 1, request) for each in (backend, calm)]
    assert seen.tokens == [30, 22, 14 + 9 + 5 + 1] * 2, "cut as ever"
    assert bits(backend, outcomes[:1], ["fixed"]) == bits(calm, outcomes[1:], ["fixed"])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_goes_on_once_there_is_memory_again(threads):
    """oneDNN fails in words of its own, and its threads are of no use after that."""
    path = os.pathsep.join([str(Path(exhausted_process.__file__).parents[1]), *sys.path])
    for _ in range(8):
        done = subprocess.run(
            [sys.executable, exhausted_process.__file__, str(threads)],
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        if done.returncode != -signal.SIGSEGV:  # in which it may end: a worker's end, no more
            break
    assert done.returncode == 0, done.stderr
    before, reason, after, another = done.stdout.split()
    assert (reason, another) == ("OUT_OF_MEMORY", "True")
    assert before == after


def test_that_a_row_needs_its_activations_anew_is_learnt_and_tried_again():
    backend = run_of(10_000)
    request = request_of(rows_of(8, [30]), masked=0)
    with capacity(EXACT.body) as plenty:
        backend.forward_backward("run", 1, request)
    with capacity(EXACT.body, 0.7 * plenty.most_bytes) as seen:
        for _ in range(32):
            backend.forward_backward("run", 1, request)
        assert (len(seen.tokens), seen.faults) == (33, 1)
        # After 32 of them it is tried whether there is memory again, and then after 64.
        for _ in range(64):
            backend.forward_backward("run", 1, request)
        assert (len(seen.tokens), seen.faults) == (33 + 65, 2)
    with capacity(EXACT.body) as again:
        backend.forward_backward("run", 1, request)
    assert again.most_bytes == plenty.most_bytes
    reference = run_of(10_000)
    for _ in range(98):
        reference.forward_backward("run", 1, request)
    close(backend._runs["run"].accumulator, reference._runs["run"].accumulator)


def test_short_rows_are_not_packed_to_a_size_that_makes_activations_anew():
    backend = run_of(10_000)
    with fault_at(EXACT.body, {0}, backward=False) as seen:
        backend.forward_backward("run", 1, request_of(rows_of(8, [30]), masked=0))
        backend.forward_backward("run", 1, request_of(rows_of(8, [10] * 6), masked=0))
    assert seen.tokens == [30, 30, 20, 20, 20]
