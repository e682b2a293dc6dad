"""Whether a store's log is consistent, read from the file itself after everything has ended."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fault.chaos_workload import Story

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.v1.operations_pb2 import OperationKind

_KINDS = {
    number: name.removeprefix("OPERATION_KIND_").lower() for name, number in OperationKind.items()
}


def audit(database: Path, story: Story) -> None:
    """Checks one run's log against what its client sent."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        _audit(connection, story)
    finally:
        connection.close()


def _audit(connection: sqlite3.Connection, story: Story) -> None:
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = connection.execute(
        "SELECT seq, kind, state, cursor, executed, finished_ns FROM operations"
        " WHERE run_id = ? ORDER BY seq",
        (story.run_id,),
    ).fetchall()
    assert [row[0] for row in rows] == list(range(1, len(story.kinds) + 1)), "every seq once"
    assert [_KINDS[row[1]] for row in rows] == story.kinds
    assert {row[2] for row in rows} == {ops.OPERATION_STATE_SUCCEEDED}
    assert all(row[4] and row[5] for row in rows), "every operation was executed and ended"
    cursors = [row[3] for row in rows]
    assert cursors == sorted(set(cursors)), "outcomes are in the run's order"
    (in_files,) = connection.execute(
        "SELECT COUNT(*) FROM operations WHERE run_id = ? AND result_ref IS NOT NULL",
        (story.run_id,),
    ).fetchone()
    assert in_files == story.large, "each large result is in a file"
    metrics = [
        StepMetrics.FromString(body)
        for (body,) in connection.execute(
            "SELECT body FROM metrics WHERE run_id = ? ORDER BY cursor", (story.run_id,)
        )
    ]
    applied = story.applied
    assert [item.step for item in metrics] == applied == list(range(1, len(applied) + 1))
    assert [(item.cursor, item.step) for item in metrics] == story.told, "each told once, in order"
    assert not set(cursors) & {item.cursor for item in metrics}
    (step, mismatches) = connection.execute(
        "SELECT step, replay_mismatches FROM runs WHERE id = ?", (story.run_id,)
    ).fetchone()
    assert step == len(applied)
    assert mismatches == 0, "every replay gave what the log has"
    (artifacts,) = connection.execute(
        "SELECT COUNT(*) FROM artifacts WHERE run_id = ?", (story.run_id,)
    ).fetchone()
    assert artifacts == story.kinds.count("save_state"), "each save made one artifact"
    assert story.resolutions == dict.fromkeys(range(1, len(rows) + 1), 1), "each future once"
