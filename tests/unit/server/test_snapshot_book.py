"""Which snapshots are taken in, and which are believed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.server.small_store import Small, operation

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.training_pb2 import RUN_STATUS_DELETED
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.operations.model import PendingOperation


def test_what_is_kept_is_whole_until_a_byte_changes(tmp_path: Path):
    async def body(small: Small) -> None:
        small.settle(5)
        assert await small.upload(5) is None
        [row] = await small.store.snapshots("run-1")
        assert (row.run_id, row.epoch, row.seq, row.step) == ("run-1", 1, 5, 5)
        assert await small.book.is_intact(row)
        for damage in (
            small.flip_bit("data.bin"),
            small.truncate("data.bin"),
            small.flip_bit("manifest.json"),
            small.truncate("manifest.json"),
        ):
            with damage(row.id):
                assert not await small.book.is_intact(row), damage
            assert await small.book.is_intact(row)
        for name in ("data.bin", "manifest.json"):
            with small.remove(name)(row.id), pytest.raises(BlobNotFoundError):
                await small.book.is_intact(row)
            assert await small.book.is_intact(row), "it may come back"

    Small.run(tmp_path, body)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": 2}, "no longer with"),
        ({"epoch": 0}, "no longer with"),
        ({"worker_id": "wkr-other"}, "no longer with"),
        ({"run_id": "run-2"}, "is gone"),
        ({"seq": 3}, "has one of seq 3"),
    ],
)
def test_a_stale_one_is_refused_and_leaves_nothing(tmp_path: Path, change, says):
    async def body(small: Small) -> None:
        small.settle(9)
        assert await small.upload(3) is None
        header = pb.SnapshotHeader(worker_id="wkr-1", run_id="run-1", epoch=1, seq=9, step=9)
        header.MergeFrom(pb.SnapshotHeader(**change))
        if change == {"epoch": 0}:
            header.epoch = 0
        assert says in (small.book.refusal(header) or "")

    Small.run(tmp_path, body)


def test_a_deleted_run_takes_none(tmp_path: Path):
    async def body(small: Small) -> None:
        small.settle(3)
        small.run_state.status = RUN_STATUS_DELETED
        assert "is gone" in (await small.upload(3) or "")
        assert small.blob_keys() == []

    Small.run(tmp_path, body)


def waiting_for(small: Small, seq: int, **fields: int) -> PendingOperation:
    """An operation that the worker has run, and of which the log knows nothing yet."""
    small.settle(seq - 1)
    pending = PendingOperation(operation(seq, **fields), b"", "m", worker_id="wkr-1")
    small.ledger.reserve(pending, small.run_state)
    small.ledger.admit([pending])
    small.run_state.queue.popleft()
    small.run_state.in_flight.append(pending)
    return pending


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs are written in the caller's own thread, so that whoever waits, waits for the log."""

    async def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", call)


async def as_far_as_it_goes(small: Small) -> None:
    """Returns when everything has happened that does so by itself."""
    for _ in range(5):
        await asyncio.sleep(0)
        await small.store.flushed()


@pytest.mark.usefixtures("at_once")
def test_it_counts_once_all_that_it_contains_is_in_the_log(tmp_path: Path):
    async def body(small: Small) -> None:
        pending = waiting_for(small, 4)
        keeping = asyncio.ensure_future(small.upload(4))
        await as_far_as_it_goes(small)
        assert not keeping.done()
        assert await small.store.snapshots("run-1") == []
        small.ledger.retire(pending)
        assert await keeping is None
        assert [row.seq for row in await small.store.snapshots("run-1")] == [4]

    Small.run(tmp_path, body)


@pytest.mark.usefixtures("at_once")
def test_it_never_counts_if_the_run_moved_before_that(tmp_path: Path):
    async def body(small: Small) -> None:
        pending = waiting_for(small, 4)
        keeping = asyncio.ensure_future(small.upload(4))
        await as_far_as_it_goes(small)
        small.ledger.recall("wkr-1")  # its worker is lost; the operation goes elsewhere …
        small.run_state.worker_id = "wkr-2"
        small.run_state.epoch = 2
        small.run_state.queue.popleft()
        pending.worker_id = "wkr-2"
        small.run_state.in_flight.append(pending)
        small.ledger.retire(pending)  # … and ends there
        assert "no longer with wkr-1" in (await keeping or "")
        assert await small.store.snapshots("run-1") == []
        assert small.blob_keys() == []

    Small.run(tmp_path, body)


def test_only_the_newest_stay(tmp_path: Path):
    async def body(small: Small) -> None:
        small.settle(9)
        unneeded = []
        for seq in (2, 4, 6, 8):
            assert await small.upload(seq) is None
            unneeded.append(await small.book.retire(small.run_state))
        assert unneeded == [0, 2, 4, 6]
        kept = await small.store.snapshots("run-1")
        assert [row.seq for row in kept] == [8, 6]
        assert {key.split("/")[1] for key in small.blob_keys()} == {row.id for row in kept}

    Small.run(tmp_path, body)


def test_a_sample_that_goes_on_holds_none_up_and_keeps_those_that_it_may_need(tmp_path: Path):
    async def body(small: Small) -> None:
        small.settle(5)
        for seq in (2, 3, 5):
            assert await small.upload(seq) is None
        sample = waiting_for(small, 6, kind=ops.OPERATION_KIND_SAMPLE)
        small.settle(12)
        for seq in (8, 9, 10):
            assert await small.upload(seq) is None
            assert await small.book.retire(small.run_state) == 3
        rows = await small.store.snapshots("run-1")
        assert [row.seq for row in rows] == [10, 9, 5, 3]
        assert (await small.restorer.newest(small.run_state)).seq == 10
        before = await small.restorer.newest(small.run_state, before=small.run_state.open_seq)
        assert before.seq == 5
        small.ledger.retire(sample)
        assert await small.book.retire(small.run_state) == 9
        assert [row.seq for row in await small.store.snapshots("run-1")] == [10, 9]

    Small.run(tmp_path, body)


def test_nothing_goes_back_before_a_private_step_that_was_told(tmp_path: Path):
    """Its sum would be noised again: with its snapshot damaged, the run's state is lost."""

    async def body(small: Small) -> None:
        small.settle(9)
        for seq in (4, 8):
            assert await small.upload(seq) is None
        newest = (await small.store.snapshots("run-1"))[0]
        small.run_state.released_seq = 8
        assert (await small.restorer.newest(small.run_state)).seq == 8
        (small.home / "blobs" / "snapshots" / newest.id / "data.bin").write_bytes(b"other")
        with pytest.raises(TenSafeFault) as caught:
            await small.restorer.newest(small.run_state)
        assert caught.value.detail.reason == "RUN_STATE_LOST"

    Small.run(tmp_path, body)
