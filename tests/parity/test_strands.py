"""A pass that is computed in strands gives what it gives in one."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from parity.deterministic_run import opened, train
from parity.group_members import Member, entries, groups, open_all, runs
from parity.loss_calls import LOSSES
from parity.scarce_memory import fault_at
from parity.tiny_runs import metric, request_of, rows_of, settings, tiny_llama
from privacy.private_runs import open_private, private_request
from unit.workers.test_plug_ins import PLACE

from tensafe.wire.status import TenSafeFault
from workers.engine import execution, strands
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.engine.kernels import KERNELS
from workers.losses.registry import load_losses
from workers.operations import LossOutcome, Reduction

EXACT = freeze("tiny", tiny_llama().double())
"""In float64 the order of sums is next to nothing, and anything counted twice stands out."""
MEMBERS = [
    Member(1, {"rank": 4, "dropout": 0.3}, {}, Reduction.SUM, (9, 14, 3), 0.8),
    Member(2, {"rank": 1, "dropout": 0.1}, {}, Reduction.TOKEN_MEAN, (21, 20), 0.5),
    Member(3, {"rank": 9}, {}, Reduction.TOKEN_MEAN, (17, 2, 8, 8), 1.0),
]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(strands, "_LEAST_TOKENS", 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many strands each pass was parted into; 1 if it was not."""
    found: list[int] = []
    side_by_side, compute = strands._side_by_side, strands.compute

    def counted(jobs, **options):
        found.append(len(jobs))
        return side_by_side(jobs, **options)

    def alone(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            found.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(strands, "_side_by_side", counted)
    monkeypatch.setattr(strands, "compute", alone)
    return found


def in_one(compute: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


def after(members: list[Member]) -> tuple[TorchBackend, list[LossOutcome]]:
    """Two calls of each."""
    backend = open_all(EXACT, members)
    outcomes = []
    for call in range(2):
        outcomes += backend.forward_backward_group(entries(members, call=call))
    return backend, outcomes


@pytest.mark.parametrize("threads", [2, 3])
@hypothesis(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(members=groups(4, list(LOSSES)))
def test_groups_of_any_runs_and_losses(threads, members):
    torch.set_num_threads(threads)
    ours, found = after(members)
    theirs, expected = in_one(partial(after, members))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, LossOutcome)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-9)
        assert one.outputs.keys() == other.outputs.keys()
        for name, output in one.outputs.items():
            np.testing.assert_allclose(output.values, other.outputs[name].values, rtol=0, atol=1e-6)
        timed = {"compute_ms", "tokens_per_second", "queue_ms"}
        for item in one.metrics:
            if item.name not in timed:
                assert item.value == pytest.approx(metric(other, item.name), rel=1e-6, abs=1e-9)
    for run, own in runs(ours, members).items():
        torch.testing.assert_close(
            own.accumulator, theirs._runs[run].accumulator, rtol=1e-9, atol=1e-9
        )


def test_a_call_of_one_run_is_in_both_strands(seen):
    ours, found = after(MEMBERS[2:])
    theirs, expected = in_one(partial(after, MEMBERS[2:]))
    assert seen == [2, 2, 1, 1]
    assert found[0].logprobs.dtype == expected[0].logprobs.dtype
    torch.testing.assert_close(
        ours._runs["0"].accumulator, theirs._runs["0"].accumulator, rtol=1e-9, atol=1e-9
    )


def test_strands_run_at_the_same_time_each_with_its_share_of_threads(monkeypatch):
    torch.set_num_threads(5)
    meeting = threading.Barrier(2)
    threads = []
    compute = strands.compute

    def meet(*args, **kwargs):
        meeting.wait(30)
        threads.append(torch.get_num_threads())
        return compute(*args, **kwargs)

    monkeypatch.setattr(strands, "compute", meet)
    monkeypatch.setattr(strands, "_LEAST_TOKENS", 14)
    after(MEMBERS[2:])  # 35 tokens
    assert threads == [2, 2] * 2
    assert torch.get_num_threads() == 5


def test_a_deterministic_run_has_its_bits_whoever_shares_the_worker(seen):
    model = freeze("tiny", tiny_llama())
    once = train(opened(TorchBackend([model], token_budget=50)), range(2))
    assert set(seen) == {2}
    backend = opened(TorchBackend([model], token_budget=4096))
    backend.open_run("other", settings(seed=3), None)
    beside = []
    for call in range(2):
        backend.forward_backward("other", call, request_of(rows_of(call, [30, 20, 10])))
        beside += train(backend, range(call, call + 1))
    assert beside == once


def test_it_has_its_bits_where_memory_is_scarce(seen, monkeypatch):
    """Activations are made anew then, one strand after the other."""
    model = freeze("tiny", tiny_llama())
    once = train(opened(TorchBackend([model], token_budget=50)), range(1))
    running: list[int] = []
    most = 0
    compute = strands.compute

    def scarce(*args, frugal, **kwargs):
        nonlocal most
        if not frugal:
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")
        running.append(1)
        most = max(most, len(running))
        time.sleep(0.01)
        try:
            return compute(*args, frugal=frugal, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(strands, "compute", scarce)
    assert train(opened(TorchBackend([model], token_budget=50)), range(1)) == once
    assert most == 1
    assert set(seen) == {2}


@pytest.mark.parametrize("backward", [False, True])
def test_a_strand_that_finds_no_memory_counts_nothing_twice(backward, seen):
    backend, calm = open_all(EXACT, MEMBERS), open_all(EXACT, MEMBERS)
    with fault_at(EXACT.body, {1}, backward=backward) as faults:
        outcomes = backend.forward_backward_group(entries(MEMBERS))
    assert faults.faults > 0
    assert 2 in seen[:1]
    expected = in_one(lambda: calm.forward_backward_group(entries(MEMBERS)))
    for run, outcome, own in zip(runs(backend, MEMBERS), outcomes, expected, strict=True):
        assert isinstance(outcome, LossOutcome)
        np.testing.assert_allclose(outcome.logprobs, own.logprobs, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            backend._runs[run].accumulator, calm._runs[run].accumulator, rtol=1e-9, atol=1e-9
        )


def test_a_call_whose_numbers_are_not_finite_takes_no_other_with_it():
    members = [replace(MEMBERS[0], loss="gspo"), MEMBERS[1], MEMBERS[2]]
    backend, without = open_all(EXACT, members), open_all(EXACT, members)
    calls = entries(members)
    bad = replace(members[1], loss="importance_sampling").request()
    bad.batch.inputs["logprobs"][:] = -1e6
    outcomes = backend.forward_backward_group([calls[0], ("1", 1, bad), calls[2]])
    assert isinstance(outcomes[1], TenSafeFault)
    clean = without.forward_backward_group([calls[0], calls[2]])
    for run, ours, theirs in zip("02", [outcomes[0], outcomes[2]], clean, strict=True):
        assert ours.logprobs.tobytes() == theirs.logprobs.tobytes()
        assert torch.equal(*(each._runs[run].accumulator for each in (backend, without)))


def test_the_first_error_is_raised_when_all_have_ended():
    ended = threading.Event()

    def slow() -> None:
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ZeroDivisionError):
        strands._side_by_side([lambda: 1 // 0, slow])
    assert ended.is_set()


def test_what_a_failed_strand_held_is_free_when_the_next_attempt_begins(monkeypatch):
    """Not only once the collector has come by."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    give_back = execution.give_back

    def fail(_module: object, inputs: tuple[torch.Tensor], _output: object) -> None:
        if not held:
            held.append(weakref.ref(inputs[0]))
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    def noted() -> None:
        alive.append(held[0]() is not None)
        give_back()

    monkeypatch.setattr(execution, "give_back", noted)
    handle = EXACT.body.layers[-1].mlp.register_forward_hook(fail)
    gc.collect()
    gc.disable()
    try:
        after(MEMBERS)
    finally:
        gc.enable()
        handle.remove()
    assert alive == [False]


def test_a_thread_that_comes_later_has_all_of_torchs():
    strands._crew.cache_clear()
    torch.set_num_threads(4)
    after(MEMBERS)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4


def test_forward_passes_too(seen):
    backend = open_all(EXACT, MEMBERS)
    found = backend.forward("2", MEMBERS[2].request())
    expected = in_one(lambda: backend.forward("2", MEMBERS[2].request()))
    assert seen == [2, 1]
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-9)


def test_what_is_for_one_thread_at_a_time_is_not_parted(seen):
    request = request_of(rows_of(1, [9, 8, 9, 8]))
    losses = load_losses([f"longest={PLACE}:longest"])
    backend = TorchBackend([EXACT], token_budget=1000, losses=losses)
    open_private(backend, "private")
    backend.forward_backward("private", 1, private_request(rows_of(1, [9, 8, 9, 8])))
    backend.open_run("own", settings(), None)
    backend.forward("own", replace(request, loss="longest", reduction=None))
    assert seen == [1, 1]
    made = KERNELS[0]
    made.adopt(made.plain)
    try:
        long = request_of(rows_of(2, [60] * 6))
        backend.forward("own", long)
    finally:
        made.adopt(None)
    assert seen == [1, 1, 1]
    backend.forward("own", long)
    assert seen == [1, 1, 1, 2]


def test_a_short_pass_or_one_thread_is_not_parted(seen, monkeypatch):
    monkeypatch.setattr(strands, "_LEAST_TOKENS", 18)
    after(MEMBERS[2:])  # 35 tokens
    monkeypatch.setattr(strands, "_LEAST_TOKENS", 1)
    torch.set_num_threads(1)
    after(MEMBERS[2:])
    assert set(seen) == {1}


def test_each_thread_of_a_cpu_has_its_own_pass():
    model: BaseModel = EXACT
    found = []
    with model.carrying(None):
        model.scope.adapters = object()  # type: ignore[assignment]
        other = threading.Thread(target=lambda: found.append(model.scope.adapters))
        other.start()
        other.join()
    assert found == [None]
