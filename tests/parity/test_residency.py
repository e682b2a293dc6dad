"""Runs that are set aside on disk and come back: no bit changes, and memory stays bounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from parity.tiny_runs import metric, request_of, rows_of, settings

from tensafe.wire.status import TenSafeFault
from workers.engine import checkpoints, residency
from workers.engine.engine import TorchBackend
from workers.engine.residency import state_bytes
from workers.operations import StepRequest

NAMES = ("a", "b", "c")


def train(backend: TorchBackend) -> dict[str, list[float]]:
    """Six calls of each run, in turn; windows of two calls stay open in between."""
    curves: dict[str, list[float]] = {name: [] for name in NAMES}
    for seed, name in enumerate(NAMES):
        options = {"rank": 2 + seed, "dropout": 0.2}
        backend.open_run(name, settings(seed=seed, accumulation_steps=2, lora=options), None)
    for call in range(6):
        for name in NAMES:
            outcome = backend.forward_backward(
                name, 2 * call + 1, request_of(rows_of(call, [9, 5]))
            )
            curves[name].append(metric(outcome, "loss"))
        for name in NAMES:
            backend.optim_step(name, StepRequest())
    return curves


def test_setting_aside_changes_no_bit(base):
    roomy, tight = TorchBackend([base], run_bytes=2**30), TorchBackend([base], run_bytes=1)
    expected = train(roomy)
    assert roomy._runs.resident == list(NAMES)
    assert train(tight) == expected
    assert tight._runs.resident == ["c"]
    for name in NAMES:
        assert torch.equal(tight._runs[name].adapter.weights, roomy._runs[name].adapter.weights)


@pytest.fixture
def roomy(base) -> TorchBackend:
    """Three runs, the oldest first, and a clock that stands until a test moves it."""
    backend = TorchBackend([base], run_bytes=2**30)
    backend._runs._clock = lambda: 0.0
    for name in NAMES:
        backend.open_run(name, settings(), None)
    return backend


def test_the_run_idle_longest_goes_first_and_those_at_work_stay(roomy):
    roomy._runs._limit_bytes = 2 * state_bytes(roomy._runs["a"])
    roomy._runs._clock = lambda: residency._IDLE_S
    roomy._runs["a"]
    assert roomy._runs.resident == ["c", "a"]
    request = request_of(rows_of(0, [9]))
    outcomes = roomy.forward_backward_group([(name, 1, request) for name in NAMES])
    assert len({metric(outcome, "loss") for outcome in outcomes}) == 1
    assert set(NAMES) == set(roomy._runs.resident)


def test_runs_that_are_not_idle_are_not_swapped(roomy):
    """Three that take turns where there is room for two: each would come back for every step."""
    roomy._runs._limit_bytes = 2 * state_bytes(roomy._runs["a"])
    seconds = itertools.count(1, 5)
    roomy._runs._clock = lambda: next(seconds)
    for _ in range(10):
        for name in NAMES:
            roomy._runs[name]
            assert len(roomy._runs.resident) == 3
    roomy._runs._clock = lambda: 1e6
    roomy._runs["a"]
    assert roomy._runs.resident == ["c", "a"]


def test_beyond_half_as_much_again_the_one_idle_longest_goes_however_short(roomy):
    roomy._runs._limit_bytes = 3 * state_bytes(roomy._runs["a"]) // 2
    roomy._runs["a"]
    assert roomy._runs.resident == ["c", "a"]


def test_a_full_disk_keeps_runs_in_memory(base, monkeypatch):
    backend = TorchBackend([base], run_bytes=1)

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workers.engine.residency.checkpoints.capture", full)
        expected = train(TorchBackend([base], run_bytes=2**30))
        assert train(backend) == expected
    assert set(backend._runs.resident) == set(NAMES)


@pytest.mark.parametrize("lack", ["file", "memory"])
def test_a_run_that_does_not_come_back_fails_alone(base, monkeypatch, lack):
    backend, alone = TorchBackend([base], run_bytes=1), TorchBackend([base], run_bytes=2**30)
    for each in (backend, alone):
        for name in ("b", "a", "c"):
            each.open_run(name, settings(), None)
    request = request_of(rows_of(0, [9, 5]))
    backend.forward_backward("b", 1, request)  # "a" and "c" wait on disk
    alone.forward_backward("b", 1, request)
    _, folder = backend._runs._aside["a"]
    load = checkpoints.load

    def scarce(run, directory, include_optimizer):
        if lack == "memory" and directory == folder:
            raise MemoryError
        return load(run, directory, include_optimizer)

    if lack == "file":
        (folder / checkpoints.ADAPTER_FILE).unlink()
    monkeypatch.setattr(checkpoints, "load", scarce)
    entries = [(name, 2, request) for name in ("a", "b", "c")]
    outcomes = backend.forward_backward_group(entries)
    steps = backend.optim_step_group([(name, StepRequest()) for name in ("a", "b", "c")])
    assert isinstance(outcomes[0], Exception)
    assert isinstance(steps[0], Exception)
    if lack == "memory":
        assert outcomes[0].detail.reason == steps[0].detail.reason == "OUT_OF_MEMORY"
    expected = alone.forward_backward_group(entries[1:])
    alone.optim_step_group([(name, StepRequest()) for name in ("b", "c")])
    assert [metric(each, "loss") for each in outcomes[1:]] == [
        metric(each, "loss") for each in expected
    ]
    for name in ("b", "c"):
        assert torch.equal(backend._runs[name].adapter.weights, alone._runs[name].adapter.weights)
    with pytest.raises((TenSafeFault, OSError)):
        backend.poison("a")


def test_a_run_that_is_closed_leaves_no_file(base):
    backend = TorchBackend([base], run_bytes=1)
    for name in NAMES:
        backend.open_run(name, settings(), None)
    folder = backend._runs._directory.name
    for name in NAMES:
        backend.close_run(name)
        backend.close_run(name)
        assert name not in backend._runs
        with pytest.raises(KeyError):
            backend._runs[name]
    import os

    assert os.listdir(folder) == []
