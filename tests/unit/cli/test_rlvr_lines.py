"""What `tensafe train rlvr` tells people of an iteration."""

from __future__ import annotations

import dataclasses

import pytest

from tensafe_client.cli.train.rlvr import _Printer
from tensafe_client.rlvr import IterationReport


def report(**changes: object) -> IterationReport:
    values: dict[str, object] = {
        field.name: 0.0 for field in dataclasses.fields(IterationReport) if field.name != "held_out"
    }
    values |= {"iteration": 2, "updates": 1, "problems": 8, "equal_problems": 0}
    values |= {"failed_rewards": {}, "parts": {}, "metrics": {}}
    return IterationReport(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({}, "tokens/s"),
        ({"problems": 5, "equal_problems": 3}, "tokens/s  3 of 8 problems dropped as equal"),
        ({"failed_rewards": {"error": 2, "crash": 1}}, "tokens/s  3 rewards failed"),
        (
            {"problems": 0, "equal_problems": 8, "updates": 0},
            "8 of 8 problems dropped as equal  no update: nothing to learn from",
        ),
    ],
)
def test_a_line_says_what_was_dropped_and_that_nothing_was_learned(capsys, changes, ending):
    _Printer(False, 9).report(report(**changes))
    line = capsys.readouterr().out
    assert line.startswith("iteration 2/9  reward ")
    assert line.endswith(ending + "\n")
