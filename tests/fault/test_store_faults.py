"""A disk that is full, locked or damaged: clearly said, nothing lost, over by itself."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.cluster import Cluster, wait_accepted
from harness.faulty_disk import (
    BIG,
    BIG_TOKENS,
    SMALL,
    bare_refusal,
    check_log,
    fill,
    serving,
    start_fails,
    steps,
)

pytestmark = pytest.mark.timeout(120)


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
        end = committed(cluster.data, tmp_path / "end")
        assert end[: len(kept)] == kept
        told = whole[-1][2]
        assert all(cursor > told for _, _, cursor in end[len(kept) :]), "no cursor is used again"


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
