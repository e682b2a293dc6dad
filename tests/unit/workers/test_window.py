"""The accumulation window against a model that keeps the whole history."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe.wire.status import TenSafeFault
from workers.operations import Combine, Metric, Reduction
from workers.window import Window, combine

MEAN, SUM = Reduction.TOKEN_MEAN, Reduction.SUM


def add(window: Window, reduction: Reduction = MEAN, loss_sum=6.0, denominator=2.0) -> None:
    window.admit(reduction)
    window.add(reduction, loss_sum=loss_sum, denominator=denominator, tokens=10, compute_ms=5.0)


def reason(window: Window) -> str:
    with pytest.raises(TenSafeFault) as caught:
        window.call()
    return caught.value.detail.reason


EVENTS = st.lists(st.sampled_from(["mean", "sum", "poison", "step"]), max_size=40)


@given(EVENTS, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 5)))
def test_any_history(events, accumulation_steps, max_steps):
    window = Window(accumulation_steps, max_steps)
    applied = calls = 0
    members: list[str] = []
    for event in events:
        # A window that was saved and restored is the same window.
        saved = json.loads(json.dumps(window.as_json()))
        window = Window(accumulation_steps, max_steps)
        window.restore(saved)
        if event == "poison":
            window.poison()
            members.append("poison")
        elif event in ("mean", "sum"):
            kinds = [kind for kind in members if kind != "poison"]
            reduction = MEAN if event == "mean" else SUM
            if kinds and kinds[0] != event:
                with pytest.raises(TenSafeFault):
                    window.admit(reduction)
                window.poison()
                members.append("poison")
            else:
                add(window, reduction)
                members.append(event)
        elif applied == max_steps:
            before = window.as_json()
            assert reason(window) == "MAX_STEPS_REACHED"
            assert window.as_json() == before
        elif calls + 1 < accumulation_steps:
            assert window.call() is None
            calls += 1
        else:
            calls = 0
            if "poison" in members:
                assert reason(window) == "WINDOW_POISONED"
            elif not members:
                assert reason(window) == "EMPTY_WINDOW"
            else:
                closed = window.call()
                count = len(members)
                assert (closed.loss_sum, closed.denominator) == (6.0 * count, 2.0 * count)
                assert closed.tokens == 10 * count
                assert closed.divisor == (2.0 * count if members[0] == "mean" else 1.0)
                applied += 1
                assert window.applied() == applied
            members = []
            assert not window.is_open
        assert window.step == applied
        assert window.is_open == any(kind != "poison" for kind in members)


def test_clear_forgets_the_window_and_keeps_the_step():
    window = Window(2)
    for _ in range(2):
        add(window)
        window.call()
    window.applied()
    fresh = window.as_json()
    assert fresh == Window(2).as_json() | {"step": 1}
    add(window, SUM)
    assert window.call() is None
    window.poison()
    window.clear()
    assert window.as_json() == fresh


def test_metrics_of_a_mean_and_of_a_sum():
    window = Window()
    add(window, loss_sum=6.0, denominator=2.0)
    add(window, loss_sum=3.0, denominator=1.0)
    values = {m.name: m for m in window.call().metrics(1.5, 1e-4, step_ms=10.0)}
    assert (values["loss"].value, values["loss"].weight) == (3.0, 3.0)
    assert values["tokens"].value == 20
    assert values["compute_ms"].value == 20.0
    assert values["tokens_per_second"].value == 1000.0
    assert (values["grad_norm"].value, values["learning_rate"].value) == (1.5, 1e-4)
    add(window, SUM, loss_sum=6.0)
    assert window.call().metrics(1.5, 1e-4, 0.0)[0].value == 6.0


def test_a_state_from_before_the_reduction_was_renamed():
    window = Window()
    window.add(MEAN, loss_sum=1.0, denominator=2.0, tokens=3, compute_ms=0.0)
    saved = window.as_json()
    saved["reduction"] = "weighted_mean"
    del saved["defined"]
    other = Window()
    other.restore(saved)
    assert other.reduction is MEAN
    assert other.defined == []


def test_metrics_combine_as_they_say():
    metrics = [
        Metric("a", 1.0, Combine.MEAN, 1.0),
        Metric("b", 2.0, Combine.MAX),
        Metric("a", 4.0, Combine.MEAN, 3.0),
        Metric("b", 1.0, Combine.MAX),
        Metric("c", 5.0, Combine.SUM),
        Metric("c", 6.0, Combine.SUM),
        Metric("d", 5.0, Combine.MIN),
        Metric("d", 6.0, Combine.MIN),
    ]
    assert combine(metrics) == [
        Metric("a", 3.25, Combine.MEAN, 4.0),
        Metric("b", 2.0, Combine.MAX),
        Metric("c", 11.0, Combine.SUM),
        Metric("d", 5.0, Combine.MIN),
    ]
