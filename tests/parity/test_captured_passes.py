"""Passes that are captured and replayed compute what they do as written.

A graph has no CPU form; here its functions are run again, on the same tensors in the same places.
`tests/gpu` captures them.
"""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakSet, ref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from parity.group_members import Member, entries, groups, open_all
from parity.loss_calls import loss_request
from parity.ragged import Again, ragged_kernel  # noqa: F401 - a fixture
from parity.scarce_memory import fault_at
from parity.test_groups import examples
from parity.tiny_models import FAMILIES
from parity.tiny_runs import lora, metric, perturb, request_of, rows_of, settings, tiny_llama
from privacy.private_runs import open_private, private_request

from tensafe.wire.status import TenSafeFault
from workers.engine import computing
from workers.engine.base_model import BaseModel, freeze
from workers.engine.dropout import _mixed_places
from workers.engine.engine import TorchBackend
from workers.engine.graphs import graphs as sizes
from workers.engine.graphs.captured import CapturedPass, Size, borders
from workers.engine.graphs.captured import Member as Segment
from workers.engine.graphs.frames import Frame
from workers.engine.graphs.graphs import Graphs, graphs_of, size_of
from workers.engine.graphs.tapes import CudaTape, _stream
from workers.engine.memory import memory_faults
from workers.engine.scoring import LossFunctionError
from workers.operations import LossOutcome, Reduction, StepRequest

pytestmark = pytest.mark.usefixtures("ragged_kernel")

TIMES = 5
"""The first two run as written."""


def capturing(backend: TorchBackend, base: BaseModel, tape=Again, **limits) -> Graphs:
    """What a backend on a GPU has from the start."""
    options = {"most_tokens": 4096, "most_bytes": 2**30} | limits
    base.graphs = Graphs(base, tape, **options)
    return base.graphs


def call_and_update(backend: TorchBackend, members: list[Member], call: int):
    """Outcomes and gradients of one call of each, and its update."""
    outcomes = backend.forward_backward_group(entries(members, call=call))
    gradients = [backend._runs[str(i)].accumulator.clone() for i in range(len(members))]
    backend.optim_step_group([(str(index), StepRequest()) for index in range(len(members))])
    return outcomes, gradients


def check(base: BaseModel, twin: BaseModel, members: list[Member], captured: int = 1) -> None:
    """The twin runs as written."""
    ours, theirs = open_all(base, members), open_all(twin, members)
    graphs = capturing(ours, base)
    begun = [ours._runs[str(i)].adapter.weights.detach().clone() for i in range(len(members))]
    for call in range(TIMES):
        # Their sizes are the same each time; the tokens and weights are not.
        found, expected = (call_and_update(one, members, call) for one in (ours, theirs))
        for outcome, reference in zip(found[0], expected[0], strict=True):
            assert isinstance(outcome, LossOutcome)
            np.testing.assert_allclose(outcome.logprobs, reference.logprobs, rtol=0, atol=1e-4)
        for gradient, reference in zip(found[1], expected[1], strict=True):
            assert (gradient - reference).norm() <= 2e-4 * reference.norm() + 1e-7
        # Other weights each time, but none so large that rounding is much of the numbers.
        for index, was in enumerate(begun):
            for one in (ours, theirs):
                one._runs[str(index)].adapter.weights.data.copy_(was).mul_(1 + 0.1 * call)
    assert len(graphs.held) == captured


def plain(**changes) -> Member:
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ("q_proj", "down_proj")}
    member = Member(3, lora, {}, Reduction.TOKEN_MEAN, (40, 17, 9, 1), 1.0)
    return replace(member, **changes)


def test_one_run_with_dropout():
    check(freeze("tiny", tiny_llama()), freeze("tiny", tiny_llama()), [plain()])


@pytest.mark.parametrize(
    "family", ["llama-gqa", "qwen2-tied-windows", "gemma3-windows", "deepseek-latent"]
)
def test_families(family):
    linear = tuple(FAMILIES[family].linear)
    member = plain(lora={"rank": 8, "alpha": 4.0, "dropout": 0.0, "target_modules": linear})
    base, twin = (freeze("tiny", FAMILIES[family].build().float()) for _ in range(2))
    check(base, twin, [member])


@examples(8)
@given(members=groups(3))
def test_runs_of_every_kind_together(members):
    # Every row scored to its end, so that the sizes come again.
    whole = [replace(member, scored=1.0) for member in members]
    check(freeze("tiny", tiny_llama()), freeze("tiny", tiny_llama()), whole)


@pytest.mark.parametrize("key", ["kl", "dpo", "ppo"])
def test_losses_that_compare_with_a_reference(key):
    found = []
    for captures in (True, False):
        base = freeze("tiny", FAMILIES["qwen3-tied"].build().float())
        backend = TorchBackend([base], token_budget=10_000)
        linear = FAMILIES["qwen3-tied"].linear
        options = settings(lora={"dropout": 0.1, "target_modules": linear})
        backend.open_run("run", options, None)
        perturb(backend, "run")
        if captures:
            capturing(backend, base)
        outcomes = [backend.forward_backward("run", 1, loss_request(key)) for _ in range(TIMES)]
        assert not captures or base.graphs.held
        found.append((outcomes, backend._runs["run"].accumulator))
    (ours, gradient), (theirs, reference) = found
    for outcome, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(outcome.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        assert metric(outcome, "loss") == pytest.approx(metric(expected, "loss"), rel=1e-3)
    assert (gradient - reference).norm() <= 1e-3 * reference.norm()


def test_a_loss_that_fails_between_the_ways_there_and_back_leaves_nothing(monkeypatch):
    base, twin = (freeze("tiny", tiny_llama()) for _ in range(2))
    ours, theirs = open_all(base, [plain()]), open_all(twin, [plain()])
    capturing(ours, base)
    for call in range(TIMES + 3):
        if call >= TIMES - 1:  # captured, and so is another size
            with monkeypatch.context() as patch:
                patch.setattr(computing, "score", failing_loss)
                (failed,) = ours.forward_backward_group(entries([plain(seed=9)], call=call))
            assert isinstance(failed, TenSafeFault)
            ours.drop_window("0")
        (_, (found,)), (_, (expected,)) = (
            call_and_update(one, [plain()], call) for one in (ours, theirs)
        )
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def failing_loss(*_: object):
    raise LossFunctionError(0, "of a plug-in") from ZeroDivisionError()


def test_others_in_the_same_frame_leave_nothing_behind():
    base, twin = (freeze("tiny", tiny_llama()) for _ in range(2))
    small = plain(lora={**plain().lora, "rank": 3, "target_modules": ("down_proj",)})
    members = [plain(), plain(seed=4), small, plain(seed=5, lengths=(30, 20))]
    ours, theirs = open_all(base, members), open_all(twin, members)
    capturing(ours, base)
    alone = [[0, 1, 3]] * 4 + [[3, 2, 0]] * 4 + [[1, 2, 0], [2, 0, 1]]
    for call, own in enumerate(alone):
        for backend in (ours, theirs):
            outcomes = backend.forward_backward_group(entries(members, own, call))
            assert all(isinstance(outcome, LossOutcome) for outcome in outcomes)
            backend.optim_step_group([(str(index), StepRequest()) for index in own])
    for index in range(len(members)):
        found, expected = (one._runs[str(index)].adapter.weights for one in (ours, theirs))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_forward_is_captured_too_and_changes_nothing():
    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=1000)
    backend.open_run("one", settings(), None)
    graphs = capturing(backend, base)
    request = request_of(rows_of(1, [20, 9]))
    found = [backend.forward("one", request) for _ in range(TIMES)]
    assert [size.trains for size in graphs.held] == [False]
    for outcome in found[1:]:
        np.testing.assert_allclose(outcome.logprobs, found[0].logprobs, rtol=0, atol=1e-5)
    assert backend._runs["one"].accumulator is None


def bits_of_deterministic_calls(base: BaseModel, tape=Again, **limits) -> list[bytes]:
    backend = TorchBackend([base], token_budget=1000)
    options = settings(deterministic=True, lora={"dropout": 0.2})
    backend.open_run("exact", options, None)
    capturing(backend, base, tape, **limits)
    found = []
    for seed in range(TIMES):
        outcome = backend.forward_backward("exact", 1, request_of(rows_of(seed, [20, 9, 33])))
        found += [outcome.logprobs.tobytes(), backend._runs["exact"].accumulator.numpy().tobytes()]
        backend.optim_step("exact", StepRequest())
    return found


def test_deterministic_calls_have_the_same_bits_captured_or_not():
    class Unable:
        def record(self, functions):
            raise RuntimeError("operation not permitted when stream is capturing")

    base = freeze("tiny", tiny_llama())
    expected = bits_of_deterministic_calls(base)
    assert [size.exact for size in base.graphs.held] == [True]
    for limits in ({"most_tokens": 63}, {"most_bytes": 1000}):
        assert bits_of_deterministic_calls(base, **limits) == expected
        assert not base.graphs.held
    assert bits_of_deterministic_calls(base, Unable) == expected
    # There is no memory for some of them, so that their activations are made anew.
    with fault_at(base.body, {0, 2, 5}, backward=True) as passes:
        assert bits_of_deterministic_calls(base) == expected
    assert passes.faults == 3


def test_what_runs_as_written_takes_no_memory_once_it_is_over(monkeypatch):
    """Nor does it wait for a garbage collection, which knows nothing of a GPU's memory."""
    left: WeakSet[CapturedPass] = WeakSet()

    class Counted(CapturedPass):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            left.add(self)

    monkeypatch.setattr(sizes, "CapturedPass", Counted)
    base = freeze("tiny", tiny_llama())
    gc.disable()
    try:
        bits_of_deterministic_calls(base, most_tokens=63)
        assert not left
    finally:
        gc.enable()


def test_a_run_that_is_gone_is_in_no_captured_pass():
    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=1000)
    graphs = capturing(backend, base)
    backend.open_run("one", settings(), None)
    for _ in range(TIMES):
        backend.forward("one", request_of(rows_of(1, [20, 9])))
        backend.forward_backward("one", 1, request_of(rows_of(1, [20, 9])))
    assert len(graphs.held) == 2
    adapter = ref(backend._runs["one"].adapter)
    backend.close_run("one")
    gc.collect()
    assert adapter() is None


def test_what_a_captured_pass_reads_of_dropout_stays_where_it_is():
    places = _mixed_places(33, torch.device("cpu"))
    for count in range(34, 200):
        _mixed_places(count, torch.device("cpu"))
    assert _mixed_places(33, torch.device("cpu")) is places


def test_private_calls_are_not_captured():
    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=1000)
    graphs = capturing(backend, base)
    open_private(backend)
    for _ in range(TIMES):
        backend.forward_backward("run", 1, private_request(rows_of(1, [20, 9])))
    assert not graphs.held


def test_what_cannot_be_captured_runs_as_written_and_says_so_once(caplog):
    class Unable:
        def record(self, functions):
            raise RuntimeError("operation not permitted when stream is capturing")

    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=1000)
    backend.open_run("one", settings(lora={"dropout": 0.2}), None)
    graphs = capturing(backend, base, Unable)
    request = request_of(rows_of(1, [20, 9]))
    with caplog.at_level(logging.WARNING):
        outcomes = [backend.forward("one", request) for _ in range(TIMES + 2)]
    assert [record.message for record in caplog.records] == [
        "passes of tiny cannot be captured and run as written: "
        "operation not permitted when stream is capturing"
    ]
    assert not graphs.held
    assert len({metric(outcome, "loss") for outcome in outcomes}) == 1


def test_a_device_that_captures_no_groups_still_captures_one_run(caplog):
    """`grouped_mm` asks an older one where its segments end, which no capture allows."""

    class NoGroups(Again):
        def record(self, functions):
            if functions[0].__self__._size.runs > 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().record(functions)

    base = freeze("tiny", tiny_llama())
    members = [plain(), plain(seed=4)]
    backend = open_all(base, members)
    graphs = capturing(backend, base, NoGroups)
    for own in [[0, 1]] * TIMES + [[0]] * TIMES + [[0, 1]] * TIMES:
        backend.forward_backward_group(entries(members, own))
    assert [size.runs for size in graphs.held] == [1]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "passes of several runs on tiny cannot be captured and run as written: "
        "operation not permitted when stream is capturing"
    ]


def test_a_lack_of_memory_releases_them_and_counts_nothing_twice():
    class Scarce(Again):
        left = 1

        def record(self, functions):
            if Scarce.left:
                Scarce.left -= 1
                functions[0]()
                raise torch.OutOfMemoryError("out of memory")
            return super().record(functions)

    base, twin = (freeze("tiny", tiny_llama()) for _ in range(2))
    ours, theirs = open_all(base, [plain()]), open_all(twin, [plain()])
    graphs = capturing(ours, base, Scarce)
    for call in range(2 * TIMES):
        (_, (found,)), (_, (expected,)) = (
            call_and_update(one, [plain()], call) for one in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert Scarce.left == 0
    assert graphs.held
    # The pass itself had room, so that nothing is said of how many tokens fit.
    assert ours._budgets["tiny"].tokens == 100_000


def test_what_there_is_no_room_to_hold_together_is_not_captured_at_each_turn():
    """A capture takes as long as some passes."""
    records = []

    class Counting(Again):
        def record(self, functions):
            records.append(len(functions))
            return super().record(functions)

    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=4000)
    for rank in (12, 20):
        backend.open_run(str(rank), settings(lora={"rank": rank}), None)
    one = Frame(base.layers, settings().lora.target_modules, 24, 1, "cpu", base.dtype).nbytes
    capturing(backend, base, Counting, most_bytes=one)
    for _ in range(12):
        for rank in (12, 20):
            backend.forward_backward(str(rank), 1, request_of(rows_of(1, [20, 9])))
    assert len(records) <= 2 * 12 / 3


def test_models_of_one_device_share_what_captured_passes_may_take(monkeypatch):
    made = []
    monkeypatch.setattr(sizes, "Graphs", lambda model, tape, *shares: made.append(shares))
    monkeypatch.setattr(sizes, "has_ragged_kernel", lambda device, dtype, width: True)
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 3200)
    names = [("one",), ("one", "two")]
    for own in names:
        TorchBackend([freeze(name, tiny_llama()) for name in own], token_budget=12_000)
    assert made == [(2400, 200), (1200, 100), (1200, 100)]


def test_whoever_lacks_memory_gets_back_what_all_models_captured():
    bases = [freeze(name, tiny_llama()) for name in ("one", "two")]
    backend = TorchBackend(bases, token_budget=1000)
    for base in bases:
        backend.open_run(base.name, replace(settings(), model_ref=base.name), None)
        capturing(backend, base)
        for _ in range(TIMES):
            backend.forward(base.name, request_of(rows_of(1, [20, 9])))
        assert base.graphs.held
    with pytest.raises(TenSafeFault), memory_faults("test"):
        raise torch.OutOfMemoryError("out of memory")
    assert not any(base.graphs.held for base in bases)


def test_a_group_of_many_layouts_finds_their_places_once(monkeypatch):
    base, found = freeze_once(), []
    find = Frame._find_places
    monkeypatch.setattr(Frame, "_find_places", lambda *of: found.append(of) or find(*of))
    frame = Frame(base.layers, settings().lora.target_modules, 32, 32, "cpu", base.dtype)
    adapters = [base.new_adapter(lora(rank=rank)) for rank in range(1, 31)]
    for _ in range(3):
        for row, adapter in enumerate(adapters):
            frame.load(row, adapter, 1.0)
    assert len(found) == len(adapters)


def held_bytes(graphs: Graphs) -> int:
    """Of all tensors of captured passes and their frames, each once."""
    found = {}
    for captured in graphs.held.values():
        for value in (*vars(captured).values(), *vars(captured.frame).values()):
            for one in value.values() if isinstance(value, dict) else [value]:
                if isinstance(one, torch.Tensor):
                    storage = one.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_all_that_they_hold_stays_within_their_share():
    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=4000)
    for rank in (12, 20):  # neither fills a row
        backend.open_run(str(rank), settings(lora={"rank": rank}), None)
    one = Frame(base.layers, settings().lora.target_modules, 24, 1, "cpu", base.dtype).nbytes
    share = int(2.2 * one)
    graphs = capturing(backend, base, most_bytes=share)
    for _ in range(TIMES):
        for rank in (12, 20):
            backend.forward_backward(str(rank), 1, request_of(rows_of(1, [20, 9])))
            assert held_bytes(graphs) <= share
    assert graphs.held


def test_few_are_held_and_adapters_take_no_more_than_their_share(monkeypatch):
    monkeypatch.setattr(sizes, "_MOST", 2)
    base = freeze("tiny", tiny_llama())
    backend = TorchBackend([base], token_budget=4000)
    ranks = [4, 12, 20]
    for rank in ranks:
        backend.open_run(str(rank), settings(lora={"rank": rank}), None)
    request = request_of(rows_of(1, [20, 9]))
    graphs = capturing(backend, base)

    def call_all():
        for _ in range(TIMES):
            for rank in ranks:
                backend.forward_backward(str(rank), 1, request)

    call_all()
    assert [size.rank for size in graphs.held] == [16, 24]
    one = Frame(base.layers, settings().lora.target_modules, 16, 1, "cpu", base.dtype).nbytes
    graphs = capturing(backend, base, most_bytes=one)
    call_all()
    assert [size.rank for size in graphs.held] == [16]
    capturing(backend, base, most_bytes=1000)
    call_all()
    assert not base.graphs.held
    capturing(backend, base, most_tokens=63)
    call_all()
    assert not base.graphs.held


@pytest.fixture
def no_streams():
    """Made so far, and none of those made here remain."""
    _stream.cache_clear()
    yield
    _stream.cache_clear()


def test_a_capture_is_of_the_models_device_in_one_stream_for_all_of_it(monkeypatch, no_streams):
    """Its kernels are asked for there; captured on another device, a graph would be empty."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(sizes, "has_ragged_kernel", lambda device, dtype, width: True)
    base = replace(freeze_once(), device="cuda:1")
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 2**40)
    graphs = graphs_of(base, 60_000)
    graphs.release()
    assert graphs_of(base, 60_000) is not None
    assert made == [torch.device("cuda:1")]


class BrokenCapture:
    """Stands in for `torch.cuda`: a capture fails at its end too, in the stream that it was in."""

    def __init__(self, monkeypatch):
        self.entered, self.ended = ["default"], []
        for name, value in (
            ("Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)),
            ("graph_pool_handle", lambda: "pool"),
            ("CUDAGraph", object),
            ("current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None)),
            ("device", lambda device: nullcontext()),
            ("stream", self.stream),
            ("graph", self.graph),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda *of: self.ended.append(of), raising=False
        )

    @contextmanager
    def stream(self, stream):
        before = list(self.entered)
        self.entered.append(stream)
        try:
            yield
        finally:
            self.entered = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.entered.append("capture")
        yield
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(monkeypatch, no_streams):
    device = BrokenCapture(monkeypatch)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaTape("cuda:1").record([lambda: None])
    assert device.entered == ["default"]
    assert device.ended == [(1, "pool")]


@hypothesis(deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=70), runs=st.integers(1, 40))
def test_a_size_holds_its_pass(lengths, runs):
    adapter = freeze_once().new_adapter(settings().lora)
    members = [Segment(adapter, 0)] * runs
    numbers = np.zeros((2, sum(lengths)), np.int64)
    size = size_of(numbers, lengths, members, trains=True)
    assert isinstance(size, Size)
    assert sum(lengths) <= size.tokens < sum(lengths) + max(64, sum(lengths) / 8 + 1)
    found = borders(lengths, size)
    assert len(found) == size.documents + 1
    assert found[0] == 0
    assert found[-1] == size.tokens
    gaps = np.diff(found)
    assert gaps[: len(lengths)].tolist() == lengths
    assert gaps.min() >= 0
    assert gaps.max() <= size.longest
    assert size.runs >= runs


def freeze_once(made: list[BaseModel] = []) -> BaseModel:  # noqa: B006 - that is what it is for
    if not made:
        made.append(freeze("tiny", tiny_llama()))
    return made[0]
