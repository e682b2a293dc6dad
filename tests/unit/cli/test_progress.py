"""The pace that `tensafe train` shows."""

from __future__ import annotations

import json

import pytest

from tensafe_client.cli.train.progress import (
    JsonProgress,
    LiveProgress,
    Pace,
    PaceMeter,
    PlainProgress,
    Step,
    describe,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def step(number: int, tokens: int = 50, total: int = 40) -> Step:
    return Step(number, total, loss=2.0, grad_norm=1.0, learning_rate=1e-3, tokens=tokens)


def test_pace_of_even_steps():
    clock = Clock()
    meter = PaceMeter(clock)
    meter.start()
    for number in range(1, 5):
        clock.now_s += 2.0
        pace = meter.measure(step(number))
    assert pace == Pace(tokens_per_second=25.0, eta_s=72.0)


def test_pace_follows_the_last_ten_steps():
    clock = Clock()
    meter = PaceMeter(clock)
    meter.start()
    for number in range(1, 31):
        clock.now_s += 100.0 if number <= 15 else 1.0
        pace = meter.measure(step(number))
    assert pace == Pace(tokens_per_second=50.0, eta_s=10.0)


@pytest.mark.parametrize(
    ("pace", "text"),
    [
        (Pace(None, None), "ETA -:--"),
        (Pace(842.4, 83.0), "842 tokens/s  ETA 1:23"),
        (Pace(10.0, 3_723.0), "10 tokens/s  ETA 1:02:03"),
    ],
)
def test_describe(pace: Pace, text: str):
    assert describe(pace) == text


def test_live_line_is_drawn_over_itself(capsys: pytest.CaptureFixture[str]):
    progress = LiveProgress()
    progress.on_start("run-1", 0, 2)
    progress.on_step(step(1, total=2))
    progress.on_saved(1, "art-1")
    progress.on_step(step(2, total=2))
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "run run-1: steps 1 to 2"
    assert lines[1].startswith("\r\x1b[K")
    assert lines[1].endswith("\r\x1b[Kstep 1  saved art-1")
    assert "2/2" in lines[2]
    assert lines[3:] == [""]


def test_plain_lines(capsys: pytest.CaptureFixture[str]):
    progress = PlainProgress()
    progress.on_start("run-1", 3, 40)
    progress.on_step(step(4))
    progress.on_eval(4, 2.5, 100)
    out = capsys.readouterr().out
    assert out.startswith(
        "run run-1: steps 4 to 40\nstep 4/40  loss 2.0000  grad_norm 1.000  lr 0.001"
    )
    assert out.endswith("step 4  held-out loss 2.5000  (100 scored tokens)\n")
    assert "\x1b" not in out


def test_json_lines(capsys: pytest.CaptureFixture[str]):
    progress = JsonProgress()
    progress.on_start("run-1", 0, 40)
    progress.on_step(step(1))
    progress.on_eval(1, 2.5, 100)
    progress.on_saved(1, "art-1")
    progress.on_notice("for people")
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [event["event"] for event in events] == ["start", "step", "eval", "saved"]
    assert events[1]["loss"] == 2.0
    assert events[3]["artifact_id"] == "art-1"
    assert captured.err == "for people\n"
