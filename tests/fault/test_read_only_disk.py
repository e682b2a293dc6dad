"""A disk that cannot be written any more, under an open store or before one is opened."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.cluster import Cluster, wait_accepted
from harness.faulty_disk import (
    BIG,
    BIG_TOKENS,
    SMALL,
    bare_refusal,
    check_log,
    serving,
    start_fails,
    steps,
)
from harness.wire import RawClient

pytestmark = pytest.mark.timeout(180)


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


@contextmanager
def writes_refused(pid: int, database: Path) -> Iterator[None]:
    """Every write of a process to its open store fails with EROFS, as on a disk that has become
    read-only: the kernel lets nobody remount one on which files are open for writing."""
    command = ["strace", "-f", "-p", str(pid), "-o", "/dev/null"]
    for suffix in ("", "-wal"):
        command += ["-P", f"{database}{suffix}"]
    command += ["-e", "inject=pwrite64,fdatasync,fsync,ftruncate:error=EROFS"]
    try:
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        pytest.skip("needs strace to fail system calls: apt-get install strace")
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        tracer.wait(10)
        pytest.skip(f"needs leave to trace processes (root, or CAP_SYS_PTRACE): {said}")
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)


def refusals(raw: RawClient, run_id: str) -> None:
    for tokens in (BIG_TOKENS, 8):  # one goes to a file, one into a row
        refused = bare_refusal(raw, run_id, tokens)
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "STORAGE_UNAVAILABLE")
        assert refused.retry_delay_s
        assert "Read-only" in refused.message or "the store's disk fails" in refused.message


def test_an_open_store_that_becomes_read_only_is_waited_for(
    tmp_path: Path, disk: Callable[[Path, int], None]
):
    blobs = tmp_path / "data" / "blobs"
    disk(blobs, 8)
    with serving(tmp_path) as (cluster, client, raw):
        tc = client.create_training_client({"model_ref": "any"})
        probe = client.create_training_client({"model_ref": "any"})
        assert [f.result(60) for f in steps(tc, BIG, 2)]
        os.kill(cluster.workers[0].pid, signal.SIGSTOP)
        accepted = steps(tc, SMALL, 4)
        wait_accepted(client)
        with writes_refused(cluster.coordinator.pid, cluster.data / "tensafe.db"):
            subprocess.run(["mount", "-o", "remount,ro", str(blobs)], check=True)
            os.kill(cluster.workers[0].pid, signal.SIGCONT)  # outcomes that cannot be stored
            refusals(raw, probe.run_id)
            later = [*steps(tc, BIG, 2), *steps(tc, SMALL, 2)]
            cluster.coordinator.wait_said("outcomes wait")
            assert [item.step for item in tc.metrics()] == [1, 2], "reading goes on"
            assert not any(future.done() for future in (*accepted, *later))
            subprocess.run(["mount", "-o", "remount,rw", str(blobs)], check=True)
        results = [future.result(60) for future in (*accepted, *later)]
        assert [result.step for result in results[1::2]] == list(range(3, 11))
        assert [item.step for item in tc.metrics()] == list(range(1, 11))
        cluster.coordinator.wait_said("the store can be written again")
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)


def test_a_file_system_that_gives_up_under_an_open_store(tmp_path: Path):
    """As ext4 does when its disk fails: read-only, until it is mounted anew."""
    image, data = tmp_path / "image", tmp_path / "data"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    data.mkdir()
    mount = ["mount", "-o", "loop", str(image), str(data)]
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and mkfs.ext4 (apt-get install e2fsprogs): {error}")
    try:
        with serving(tmp_path) as (cluster, client, raw):
            tc = client.create_training_client({"model_ref": "any"})
            probe = client.create_training_client({"model_ref": "any"})
            assert [f.result(60) for f in steps(tc, BIG, 2)]
            os.kill(cluster.workers[0].pid, signal.SIGSTOP)
            accepted = steps(tc, SMALL, 4)
            wait_accepted(client)
            subprocess.run(["mount", "-o", "remount,abort", str(data)], check=True)
            os.kill(cluster.workers[0].pid, signal.SIGCONT)
            refusals(raw, probe.run_id)
            later = [*steps(tc, BIG, 2), *steps(tc, SMALL, 2)]
            cluster.coordinator.wait_said("outcomes wait")
            assert not any(future.done() for future in (*accepted, *later))
            assert cluster.coordinator.stop() == 0
            subprocess.run(["umount", str(data)], check=True)
            subprocess.run(["e2fsck", "-p", str(image)], check=False, capture_output=True)
            subprocess.run(mount, check=True)
            cluster.coordinator.start()
            cluster.coordinator.wait_ready()
            results = [future.result(60) for future in (*accepted, *later)]
            assert [result.step for result in results[1::2]] == list(range(3, 11))
            assert [item.step for item in tc.metrics()] == list(range(1, 11))
            assert cluster.stop() == [0, 0]
            check_log(data)
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)
