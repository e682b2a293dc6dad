"""The watchdog bites what exceeds its limit, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from unit.workers.planned import batch

from tensafe.v1 import training_pb2 as training
from workers import watchdog
from workers.watchdog import Activity, OperationLimits, Step, StepClock, Watchdog, tokens_of


@contextmanager
def watching(activity: Activity) -> Iterator[tuple[list[Step], threading.Event]]:
    bitten: list[Step] = []
    bit = threading.Event()

    def bite(step: Step, observed_s: float) -> None:
        assert observed_s > step.limit_s
        bitten.append(step)
        activity.end()
        bit.set()

    watching = Watchdog(activity, frozen_limit_s=600, check_s=0.01, bite=bite)
    watching.start()
    try:
        yield bitten, bit
    finally:
        watching.close()


def test_an_operation_beyond_its_limit_is_bitten():
    activity = Activity()
    with watching(activity) as (bitten, bit):
        activity.begin("op-1", "run-1", 0.05)
        assert bit.wait(30)
    assert [step.operation_id for step in bitten] == ["op-1"]


def test_many_short_operations_are_not_one_long_one():
    activity = Activity()
    with watching(activity) as (bitten, bit):
        for number in range(40):
            activity.begin(f"op-{number}", "run-1", 0.2)
            assert not bit.wait(0.02)
        activity.end()
        assert not bit.wait(0.4)
    assert not bitten


def test_time_in_which_the_process_stood_still_does_not_count(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    clock = StepClock(most_s=2.0)
    first, second = Step("op-1", "run-1", 60.0, now), Step("op-2", "run-1", 60.0, now)
    seen = []
    for passed_s, step in [
        (1, first),
        (1, first),
        (900, first),
        (1, first),
        (1, second),
        (1, None),
    ]:
        now += passed_s
        seen.append(clock.look(step))
    assert seen == [0.0, 1.0, 3.0, 4.0, 0.0, 0.0]


def sample(prompts: int, **params: int) -> training.OperationSpec:
    spec = training.OperationSpec(sample=training.Sample(params=params))
    for _ in range(prompts):
        spec.sample.prompts.add().text = "ab"
    return spec


def test_limits_grow_with_tokens():
    limits = OperationLimits(base_s=10, per_token_ms=100)
    fb = training.OperationSpec(forward_backward=training.ForwardBackward(batch=batch((30, 20))))
    assert tokens_of(fb) == 50
    assert limits.of(fb) == pytest.approx(15)
    assert limits.of(training.OperationSpec(optim_step=training.OptimStep())) == 10
    assert 128 <= tokens_of(sample(1)) <= 140
    assert 2 * 3 * 50 <= tokens_of(sample(2, max_tokens=50, num_samples=3)) <= 2 * 3 * 50 + 20
    assert tokens_of(training.OperationSpec(load_state=training.LoadState())) == 0
    assert np.isfinite(limits.of(sample(1, max_tokens=2**20)))
