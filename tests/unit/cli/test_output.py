"""Results as JSON and as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest

from tensafe_client.cli.output import print_json, print_table, size, to_jsonable
from tensafe_client.config import LoRAConfig, TrainingConfig
from tensafe_client.errors import RunNotFoundError


@dataclass(frozen=True)
class Thing:
    name: str
    when: datetime
    values: object = field(repr=False)


def test_results_become_json(capsys: pytest.CaptureFixture[str]):
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    print_json(Thing("a", when, {"x": np.arange(3, dtype=np.int32), "y": np.float32(0.5)}))
    assert json.loads(capsys.readouterr().out) == {
        "name": "a",
        "when": "2026-01-02T03:04:05+00:00",
        "values": {"x": [0, 1, 2], "y": 0.5},
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (np.float32("nan"), None),
        (float("inf"), "Infinity"),  # an ε without noise is no unknown one
        (np.float32("-inf"), "-Infinity"),
    ],
)
def test_numbers_that_json_lacks_become_what_it_has(value: float, written: str | None):
    assert to_jsonable({"x": value, "y": [value, 1.0]}) == {"x": written, "y": [written, 1.0]}


def test_arrays_with_nan_stay_json():
    assert to_jsonable(np.asarray([1.0, np.nan])) == [1.0, None]


def test_a_config_becomes_json():
    shown = to_jsonable(TrainingConfig("m", lora_config=LoRAConfig(rank=4)))
    assert shown["lora_config"]["rank"] == 4
    assert shown["optimizer"]["betas"] == [0.9, 0.999]


def test_an_error_becomes_json():
    error = RunNotFoundError("no run run-1", reason="RUN_NOT_FOUND", code="NOT_FOUND")
    assert to_jsonable(error) == {
        "code": "NOT_FOUND",
        "reason": "RUN_NOT_FOUND",
        "message": "no run run-1",
    }


def test_table(capsys: pytest.CaptureFixture[str]):
    print_table(("NAME", "N"), [("long name", 1), (None, 20)])
    assert capsys.readouterr().out == "NAME       N\nlong name  1\n-          20\n"
    print_table(("NAME",), [])
    assert capsys.readouterr().out == "(none)\n"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_size(size_bytes: int, text: str):
    assert size(size_bytes) == text


def test_what_a_terminal_would_obey_is_shown_as_its_escape(capsys: pytest.CaptureFixture[str]):
    print_table(("NAME",), [("a\x1b[2J\tb\n\u202e",), ("größe 漢",)])
    assert capsys.readouterr().out == "NAME\na\\x1b[2J\\tb\\n\\u202e\ngröße 漢\n"
