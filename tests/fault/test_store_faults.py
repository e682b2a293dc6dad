"""A disk that is full, read-only, locked or damaged: clearly said, nothing lost, over by itself."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.cluster import Cluster, wait_accepted
from harness.wire import RawClient, batch, float32, forward_backward, int32, int64, raw_client

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import ErrorDetail
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient

pytestmark = pytest.mark.timeout(120)
SMALL = [Datum(range(1, 9), range(2, 10), weights=[1.0] * 8)]
BIG_TOKENS = 20_000  # three arrays of 4 bytes each: above what lies in a row
BIG = [Datum(range(BIG_TOKENS), range(BIG_TOKENS), weights=[1.0] * BIG_TOKENS)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """Mounts a small disk of its own at a directory."""
    mounted: list[Path] = []

    def mount(directory: Path, mebibytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tensafe-test", str(directory)],
            capture_output=True,
            check=False,
        )
        if ran.returncode:
            pytest.skip(f"this user may not mount a small disk: {ran.stderr.decode()}")
        mounted.append(directory)

    yield mount
    for directory in reversed(mounted):
        subprocess.run(["umount", "-l", str(directory)], check=True)


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


def test_a_full_disk_is_waited_for(tmp_path: Path, disk: Callable[[Path, int], None]):
    disk(tmp_path / "data", 12)
    with serving(tmp_path) as (cluster, client, raw):
        tc = client.create_training_client({"model_ref": "any"})
        probe = client.create_training_client({"model_ref": "any"})
        assert [f.result(60) for f in steps(tc, BIG, 3)]
        ballast = fill(cluster.data)
        for tokens in (BIG_TOKENS, 64):  # one goes to a file, one into a row
            refused = bare_refusal(raw, probe.run_id, tokens)
            assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "STORAGE_FULL")
            assert refused.retry_delay_s
            assert "disk" in refused.message
            assert "full" in refused.message
        waiting = [*steps(tc, BIG, 3), *steps(tc, SMALL, 3)]
        assert not waiting[-1].done()
        ballast.unlink()
        assert [f.result(60).step for f in waiting[1::2]] == list(range(4, 10))
        assert [item.step for item in tc.metrics()] == list(range(1, 10))
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)
        assert not [path for path in cluster.data.rglob(".*") if path.is_file()], "no halves left"


def test_a_full_blob_directory_refuses_big_things_only(
    tmp_path: Path, disk: Callable[[Path, int], None]
):
    blobs = tmp_path / "data" / "blobs"
    disk(blobs, 4)
    with serving(tmp_path) as (cluster, client, raw):
        tc = client.create_training_client({"model_ref": "any"})
        probe = client.create_training_client({"model_ref": "any"})
        kept = tc.save_state().artifact_id
        ballast = fill(blobs)
        assert bare_refusal(raw, probe.run_id, BIG_TOKENS).reason == "STORAGE_FULL"
        assert [f.result(60) for f in steps(tc, SMALL, 2)], "what fits into rows goes on"
        error = tc.save_state_async().exception(60)
        assert error is not None
        assert error.reason == "STORAGE_FULL"  # type: ignore[attr-defined]
        big = tc.forward_backward(BIG)
        ballast.unlink()
        assert big.result(60).loss
        saved = client.download_artifact(tc.save_state().artifact_id, tmp_path / "saved")
        assert list(saved.iterdir())
        assert client.download_artifact(kept, tmp_path / "kept")
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)


def test_a_read_only_blob_directory_refuses_and_comes_back(
    tmp_path: Path, disk: Callable[[Path, int], None]
):
    blobs = tmp_path / "data" / "blobs"
    disk(blobs, 4)
    with serving(tmp_path) as (_, client, raw):
        tc = client.create_training_client({"model_ref": "any"})
        probe = client.create_training_client({"model_ref": "any"})
        subprocess.run(["mount", "-o", "remount,ro", str(blobs)], check=True)
        refused = bare_refusal(raw, probe.run_id, BIG_TOKENS)
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "STORAGE_UNAVAILABLE")
        assert "Read-only" in refused.message
        big = tc.forward_backward(BIG)
        small = tc.optim_step()
        subprocess.run(["mount", "-o", "remount,rw", str(blobs)], check=True)
        assert big.result(60).loss
        assert small.result(60).applied


def test_a_store_that_another_process_locks_is_waited_for(tmp_path: Path):
    with serving(tmp_path) as (cluster, client, raw):
        tc = client.create_training_client({"model_ref": "any"})
        probe = client.create_training_client({"model_ref": "any"})
        os.kill(cluster.workers[0].pid, signal.SIGSTOP)
        accepted = steps(tc, SMALL, 4)
        wait_accepted(client)
        foreign = sqlite3.connect(cluster.data / "tensafe.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        os.kill(cluster.workers[0].pid, signal.SIGCONT)  # now outcomes come that cannot be stored
        refused = bare_refusal(raw, probe.run_id, 8)
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "STORAGE_UNAVAILABLE")
        assert "another process holds a lock" in refused.message
        later = steps(tc, SMALL, 4)
        cluster.coordinator.wait_said("outcomes wait")
        assert not any(future.done() for future in accepted)
        foreign.execute("ROLLBACK")
        foreign.close()
        results = [future.result(60) for future in (*accepted, *later)]
        assert [result.step for result in results[1::2]] == list(range(1, 9))
        cluster.coordinator.wait_said("the store can be written again")
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_torn_log_keeps_what_was_committed_before_the_tear(tmp_path: Path, damage: str):
    with serving(tmp_path) as (cluster, client, _):
        tc = client.create_training_client({"model_ref": "any"})
        for _ in range(6):
            for future in steps(tc, SMALL, 1):
                future.result(60)
        cluster.coordinator.kill()
        wal = cluster.data / "tensafe.db-wal"
        whole = committed(cluster.data, tmp_path / "before")
        with wal.open("r+b") as file:
            size = wal.stat().st_size
            if damage == "cut":
                file.truncate(size - 6000)
            else:
                file.seek(size - 6000)
                file.write(os.urandom(64))
        kept = committed(cluster.data, tmp_path / "after")
        assert kept == whole[: len(kept)]
        assert 0 < len(kept) < len(whole)
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()
        assert "bytes that are no committed transaction" in cluster.coordinator.log
        again = client.training_client(tc.run_id)
        assert [future.result(60) for future in steps(again, SMALL, 2)]
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)
        assert committed(cluster.data, tmp_path / "end")[: len(kept)] == kept


def test_a_log_that_cannot_be_read_at_all_is_not_dropped(tmp_path: Path):
    with serving(tmp_path) as (cluster, client, _):
        client.create_training_client({"model_ref": "any"})
        cluster.coordinator.kill()
        wal = cluster.data / "tensafe.db-wal"
        whole = wal.read_bytes()
        wal.write_bytes(os.urandom(8) + whole[8:])
        assert start_fails(cluster) == 1
        assert "move this file away" in cluster.coordinator.log
        wal.write_bytes(whole)
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()
        assert len(client.runs()) == 1


def committed(data: Path, copy: Path) -> list[tuple]:
    """The log's operations as SQLite recovers them from a copy of the files."""
    copy.mkdir()
    for path in data.glob("tensafe.db*"):
        shutil.copy(path, copy)
    connection = sqlite3.connect(copy / "tensafe.db")
    try:
        return connection.execute(
            "SELECT id, seq, cursor FROM operations WHERE cursor IS NOT NULL ORDER BY cursor"
        ).fetchall()
    except sqlite3.OperationalError:  # not even the tables are there
        return []
    finally:
        connection.close()


def test_a_start_that_cannot_use_the_store_says_why(tmp_path: Path):
    cluster = Cluster(tmp_path)
    with cluster:
        cluster.start()
        assert cluster.coordinator.stop() == 0
        foreign = sqlite3.connect(cluster.data / "tensafe.db", isolation_level=None)
        foreign.execute("PRAGMA locking_mode = EXCLUSIVE")
        foreign.execute("BEGIN EXCLUSIVE")
        assert start_fails(cluster) == 1
        assert "end the other process that uses it" in cluster.coordinator.log
        foreign.execute("ROLLBACK")
        foreign.close()
        for name in ("tensafe.db-wal", "tensafe.db-shm"):
            (cluster.data / name).unlink(missing_ok=True)
        (cluster.data / "tensafe.db").write_bytes(b"no database at all" * 1000)
        assert start_fails(cluster) == 1
        assert "restore it from a backup" in cluster.coordinator.log
        assert "Traceback" not in cluster.coordinator.log


def test_a_start_on_a_read_only_disk_says_so(tmp_path: Path, disk: Callable[[Path, int], None]):
    data = tmp_path / "data"
    disk(data, 8)
    with Cluster(tmp_path) as cluster:
        cluster.start()
        assert cluster.coordinator.stop() == 0
        subprocess.run(["mount", "-o", "remount,ro", str(data)], check=True)
        assert start_fails(cluster) == 1
        assert "Read-only file system" in cluster.coordinator.log
        assert "Traceback" not in cluster.coordinator.log
        subprocess.run(["mount", "-o", "remount,rw", str(data)], check=True)
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()


def start_fails(cluster: Cluster) -> int:
    cluster.coordinator.start()
    return cluster.coordinator.wait_ended(30)
