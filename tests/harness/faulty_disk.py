"""Disks that fail while a service uses them: small, read-only, aborted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.cluster import Cluster
from harness.wire import RawClient, batch, float32, forward_backward, int32, int64, raw_client
from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import ErrorDetail
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient

SMALL = [Datum(range(1, 9), range(2, 10), weights=[1.0] * 8)]
BIG_TOKENS = 20_000  # three arrays of 4 bytes each: above what lies in a row
BIG = [Datum(range(BIG_TOKENS), range(BIG_TOKENS), weights=[1.0] * BIG_TOKENS)]


@contextmanager
def serving(home: Path) -> Iterator[tuple[Cluster, ServiceClient, RawClient]]:
    """A mock service with one worker, a client of one tenant, and the same client bare."""
    with Cluster(home) as cluster:
        cluster.start()
        cluster.add_worker("--backend", "mock").wait_ready()
        key = cluster.new_tenant("tenant")
        with (
            ServiceClient(cluster.target, api_key=key) as client,
            raw_client(cluster.target, key) as raw,
        ):
            yield cluster, client, raw


def fill(directory: Path) -> Path:
    """Takes all the space that is left."""
    ballast = directory / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def steps(tc: TrainingClient, data: list[Datum], count: int) -> list[OperationFuture]:
    return [future for _ in range(count) for future in (tc.forward_backward(data), tc.optim_step())]


def bare_refusal(raw: RawClient, run_id: str, tokens: int) -> ErrorDetail:
    """Submits forward_backwards until one is refused; the error as a client without SDK has it."""
    row = list(range(tokens))
    content = batch(
        int64([0, tokens]), int32(row), target_tokens=int32(row), weights=float32([1.0] * tokens)
    )
    for _ in range(4096):
        seq = raw.next_seq(run_id)
        error = raw.submit(forward_backward(run_id, seq, content))
        if error is not None:
            assert raw.next_seq(run_id) == seq, "a refusal of this kind takes no seq"
            return error
    raise AssertionError("nothing was refused")


def check_log(data: Path) -> None:
    connection = sqlite3.connect(data / "tensafe.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    unfinished = connection.execute(
        "SELECT COUNT(*) FROM operations WHERE state NOT IN (?, ?)",
        (ops.OPERATION_STATE_SUCCEEDED, ops.OPERATION_STATE_FAILED),
    ).fetchone()
    assert unfinished == (0,)
    cursors = [row[0] for row in connection.execute("SELECT cursor FROM operations ORDER BY rowid")]
    assert len(set(cursors)) == len(cursors)
    connection.close()


def start_fails(cluster: Cluster) -> int:
    cluster.coordinator.start()
    return cluster.coordinator.wait_ended(30)
