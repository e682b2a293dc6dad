"""A recovery whose snapshots cannot be read at the moment: it waits, or begins at another point.

Nothing is removed that is there again when the disk is.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, outcomes, submit
from fault.order_world import World

from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet import dispatcher


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was given up is tried again without a pause."""
    monkeypatch.setattr(dispatcher, "_RETRY_S", 0.0)


@pytest.fixture
def run(world: World) -> str:
    """With two snapshots."""
    [run_id] = world.next_seq
    for _ in range(2):
        submit(world, run_id, GRADIENT, UPDATE)
        flow(world)
        assert world.do(world.snapshot(run_id)) is None
    return run_id


def seqs(world: World, run: str) -> list[int]:
    return [row.seq for row in world.do(world.store.snapshots(run))]


def restored_from(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "restoring" in record.msg]
    return [re.search(r"at seq (\d+)|its (start)", text)[1] or "start" for text in found]


@pytest.mark.parametrize("cause", [errno.EMFILE, errno.ESTALE, errno.EACCES, errno.EIO])
def test_what_cannot_be_read_for_a_moment_is_still_there_afterwards(
    world: World,
    run: str,
    cause: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    read, left = world.blobs.read, [3]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(cause, "not now")
        return read(*arguments)

    monkeypatch.setattr(world.blobs, "read", fail)
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 6
    assert world.result(world.rows(run)[-1]).optim_step.step == 3
    assert seqs(world, run) == [4, 2]
    if cause != errno.EIO:  # a part of the disk may be broken for ever
        assert restored_from(caplog) == ["4"], "it has waited"


def test_what_is_away_is_passed_over_and_used_once_it_is_back(
    world: World, run: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    there, away = world.home / "blobs" / "snapshots", world.home / "away"
    there.rename(away)
    world.do(world.kill_worker())
    submit(world, run, GRADIENT)
    world.finish()
    assert seqs(world, run) == [4, 2]
    away.rename(there)
    world.do(world.kill_worker())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 6
    assert restored_from(caplog)[-1] == "4"


def test_what_is_passed_over_counts_for_none_of_the_kept(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    newest, _ = world.do(world.store.snapshots(run))
    read = world.blobs.read

    def fail(key: str, *arguments: int) -> Iterator[bytes]:
        if newest.id in key:
            raise OSError(errno.EIO, "not there")
        return read(key, *arguments)

    monkeypatch.setattr(world.blobs, "read", fail)
    world.do(world.kill_worker())
    submit(world, run, GRADIENT, UPDATE)
    world.finish()
    assert world.do(world.snapshot(run)) is None
    world.do(world.prune(run))
    assert seqs(world, run) == [6, 4, 2]
    submit(world, run, GRADIENT, UPDATE)
    flow(world)
    assert world.do(world.snapshot(run)) is None
    world.do(world.prune(run))
    assert seqs(world, run) == [8, 6]


def test_a_snapshot_that_one_worker_cannot_load_is_given_to_another(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    world = World(runs=1, workers=2)
    [run] = world.next_seq
    for _ in range(2):
        submit(world, run, GRADIENT, UPDATE)
        world.finish()
        holder = _holder(world, run)
        assert world.do(world.snapshot(run, holder)) is None
    sick = world.hosts[1 - holder].worker
    sick.transfers.fetch_snapshot = _not_loaded
    world.do(world.cut(holder))
    submit(world, run, GRADIENT, UPDATE)
    world.do(world.connect(holder))
    world.do(world.kill_worker(holder))
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 6
    assert restored_from(caplog) == ["4", "4"], "by another worker"
    world.do(world.cut(holder))
    submit(world, run, GRADIENT, UPDATE)
    for _ in range(4):
        world.do(world.deliver(1 - holder))
        sick.execute()
        world.do(world.report(1 - holder))
    assert restored_from(caplog)[2:] == ["2", "start"], "the sick one, which is not asked twice"
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 8
    world.close()


def _holder(world: World, run: str) -> int:
    """Number of the machine that has the run."""
    held_by = world.coordinator.ledger.runs[run].worker_id
    [number] = [at for at, host in enumerate(world.hosts) if host.link and host.link.id == held_by]
    return number


def _not_loaded(snapshot_id: str, directory: Path) -> None:
    raise TenSafeFault("CHECKSUM_MISMATCH", "it came otherwise than it was sent")
