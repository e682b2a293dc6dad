"""The lines of a ledger, as text: what is counted together has one text, and keeps it."""

from __future__ import annotations

import pytest

from tensafe_server.privacy.lines import Line

OLD = (
    '{"max_participation": null, "noise_multiplier": 1.5, "run_id": "run-1", '
    '"sample_rate": null, "sampling": "client_attested", "test_mode": false}'
)


def test_an_entry_of_before_units_were_told_apart_is_continued() -> None:
    line = Line("client_attested", 1.5, None, "run-1")
    assert Line.from_json(OLD) == line
    assert line.to_json() == OLD


@pytest.mark.parametrize(
    "line",
    [
        Line("server_poisson", 0.8, 0.01),
        Line("server_poisson", 0.8, 0.01, unit="unit_id"),
        Line("client_attested", 1.5, 0.1, "run-1", 3, test_mode=True, unit="unit_id"),
    ],
)
def test_what_was_written_is_read(line: Line) -> None:
    assert Line.from_json(line.to_json()) == line
