"""What SQL cannot fill in: columns whose values stand in the protos that are stored beside them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping

from google.protobuf.message import DecodeError

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe.v1.training_pb2 import OperationSpec

_PAGE = 256


def _fill_expiries(connection: sqlite3.Connection) -> None:
    """When the artifacts' times to live are over."""
    for row, body in _pages(connection, "SELECT rowid, body FROM artifacts WHERE rowid > ?"):
        artifact = Artifact.FromString(body)
        if artifact.HasField("expires_at"):
            connection.execute(
                "UPDATE artifacts SET expires_ns = ? WHERE rowid = ?",
                (artifact.expires_at.ToNanoseconds(), row),
            )


def _fill_deadlines(connection: sqlite3.Connection) -> None:
    """When the times to live of waiting operations are over. What they carry may lie in the blob
    store, which is not at hand here: those wait on, without an end."""
    query = (
        f"SELECT rowid, spec FROM operations WHERE state = {ops.OPERATION_STATE_QUEUED}"  # noqa: S608
        " AND spec IS NOT NULL AND rowid > ?"
    )
    for row, data in _pages(connection, query):
        try:
            spec = OperationSpec.FromString(data)
        except DecodeError:
            continue  # its operation will fail when its turn comes; the others' store opens
        if spec.HasField("time_to_live"):
            connection.execute(
                "UPDATE operations SET deadline_ns = created_ns + ? WHERE rowid = ?",
                (spec.time_to_live.ToNanoseconds(), row),
            )


def _pages(connection: sqlite3.Connection, query: str) -> Iterator[tuple[int, bytes]]:
    """(rowid, proto) of rows, of which few are in memory at a time."""
    after = 0
    while rows := connection.execute(f"{query} ORDER BY rowid LIMIT {_PAGE}", (after,)).fetchall():
        yield from rows
        after = rows[-1][0]


FILLS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    3: _fill_expiries,
    4: _fill_deadlines,
}
"""By version: what comes after its script, in the same transaction."""
