"""A store that has lost what was last written to it, whether that can be seen or not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from fault.order_moves import GRADIENT, UPDATE, flow, submit
from fault.order_world import TENANT, World
from harness.cluster import Cluster
from harness.faulty_disk import SMALL, check_log, serving, steps

from tensafe_client import OperationFuture, OperationLostError, SequenceGapError
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.blobs.stub import StubBlobStore
from tensafe_server.events.hub import EventHub
from tensafe_server.store.base import EventScope
from tensafe_server.store.sqlite import SqliteStore

_HEADER, _FRAME = 32, 24 + 4096


def _keep(wal: Path) -> int:
    """Bytes of its first half, whole frames."""
    frames = (wal.stat().st_size - _HEADER) // _FRAME
    return _HEADER + frames // 2 * _FRAME


def _fill_tail(wal: Path, content: Callable[[int], bytes]) -> None:
    size, kept = wal.stat().st_size, _keep(wal)
    with wal.open("r+b") as file:
        file.seek(kept)
        file.write(content(size - kept))


def _flip(wal: Path) -> None:
    at = _keep(wal) + 24 + 50
    data = bytearray(wal.read_bytes())
    data[at] ^= 1
    wal.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit flipped": _flip,
    "cut within a frame": lambda wal: os.truncate(wal, _keep(wal) + 100),
    "cut at a frame's end": lambda wal: os.truncate(wal, _keep(wal)),
    "a tail of zeros": lambda wal: _fill_tail(wal, bytes),
    "a tail of garbage": lambda wal: _fill_tail(wal, os.urandom),
    "cut to nothing": lambda wal: os.truncate(wal, 0),
    "moved away": lambda wal: wal.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_cursor_that_was_told_is_given_to_another_event(
    world: World, run: str, tmp_path: Path, damage: str
):
    submit(world, run, *[GRADIENT, UPDATE] * 5)
    flow(world, 20)
    hub = world.coordinator.hub

    async def told() -> list[int]:
        stream = hub.stream(EventScope(TENANT, include_metrics=True), 0, follow=False)
        return [cursor async for _, cursor in stream]

    newest = world.do(told())[-1]
    for name in ("store.db", "store.db-wal"):
        shutil.copy(world.home / name, tmp_path / name)
    DAMAGES[damage](tmp_path / "store.db-wal")
    before = newest
    for _ in range(2):  # the second time nothing was written in between
        first, left = world.do(_begin(tmp_path / "store.db", newest))
        assert left < newest, "it has lost something"
        assert first > before
        before = first


async def _begin(path: Path, cursor: int) -> tuple[int, int]:
    """What a coordinator's start would give to its first event, and the newest that it has. Who
    comes back with a cursor from before is let in."""
    store = await SqliteStore.open(path)
    hub = EventHub(store, Payloads(StubBlobStore()))
    await hub.load()
    assert await anext(hub.stream(EventScope(TENANT), cursor)) == ([], cursor)
    left = await store.last_cursor()
    await store.close()
    return hub.next_cursor(), left


def test_what_a_clock_that_was_set_back_gives_is_new_to_the_store(
    world: World, run: str, monkeypatch: pytest.MonkeyPatch
):
    submit(world, run, GRADIENT)
    flow(world)
    last = world.do(world.store.last_cursor())
    monkeypatch.setattr("tensafe_server.events.hub.first_number", lambda: 7)
    world.do(world.restart())
    assert world.coordinator.hub.next_cursor() == last + 1


def test_an_epoch_that_was_lost_is_given_to_nobody(world: World, run: str):
    """Not even by a start on what an earlier one has begun with, as on a backup."""
    submit(world, run, GRADIENT)
    flow(world)
    epochs = []
    for _ in range(2):
        world.do(world.restart())
        world.do(world.kill_worker())
        submit(world, run, GRADIENT)
        flow(world)
        epochs.append(world.coordinator.ledger.runs[run].epoch)
        world.do(world.store._execute("UPDATE runs SET epoch = 1", ()))
    assert epochs[0] < epochs[1]


@pytest.mark.parametrize("put_back", ["a backup", "a log cut at a frame's end"])
def test_who_waits_for_what_is_lost_hears_of_it_and_goes_on(tmp_path: Path, put_back: str):
    with serving(tmp_path / "home") as (cluster, client, _), ExitStack() as stack:
        tc = client.create_training_client({"model_ref": "any"})
        followed = stack.enter_context(closing(tc.metrics(follow=True)))
        for future in steps(tc, SMALL, 2):
            future.result(60)
        seen = [next(followed).step for _ in range(2)]
        [worker] = cluster.workers
        copies = _copy(cluster, tmp_path / "copies")
        os.kill(worker.pid, signal.SIGSTOP)
        lost, later = steps(tc, SMALL, 1)
        _wait_acknowledged(later)
        cluster.coordinator.kill()
        if put_back == "a backup":
            for path in copies.iterdir():
                shutil.copy(path, cluster.data)
        else:
            os.truncate(cluster.data / "tensafe.db-wal", (copies / "tensafe.db-wal").stat().st_size)
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()
        for future in (lost, later):
            with pytest.raises(OperationLostError, match=f"seq {future.seq} of {tc.run_id}"):
                future.result(60)
        with pytest.raises(SequenceGapError):
            tc.optim_step()
        again = client.training_client(tc.run_id)
        futures = steps(again, SMALL, 2)
        _wait_acknowledged(futures[-1])
        os.kill(worker.pid, signal.SIGCONT)  # it has what is lost, of which the seqs are used again
        results = [future.result(60) for future in futures]
        assert [result.step for result in results[1::2]] == [3, 4]
        seen += [next(followed).step for _ in range(2)]
        assert seen == [1, 2, 3, 4]
        assert client.verify_run(tc.run_id).reproduces
        assert cluster.stop() == [0, 0]
        check_log(cluster.data)


def _copy(cluster: Cluster, home: Path) -> Path:
    home.mkdir()
    for name in ("tensafe.db", "tensafe.db-wal"):
        shutil.copy(cluster.data / name, home / name)
    return home


def _wait_acknowledged(future: OperationFuture) -> None:
    session = future._session
    assert session.io.run(session.operations.identified(future))
