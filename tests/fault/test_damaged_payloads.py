"""What a waiting operation was to do is gone from the blob store, or is not what was stored there:
that operation fails and says so, and the service and all others go on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault.order_moves import GRADIENT, UPDATE, outcomes, submit
from fault.order_world import World, forward_backward, sample

from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs import payloads
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.blobs.payloads import INLINE_BYTES
from tensafe_server.operations import outcomes as outcomes_module


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


damages = pytest.mark.parametrize("damage", [Path.unlink, flip_a_bit], ids=["gone", "changed"])


@pytest.fixture
def world() -> Iterator[World]:
    made = World(runs=2)
    yield made
    made.close()


def restart_with(world: World, damage: Callable[[Path], None]) -> None:
    """Of what is in the blob store."""
    world.do(world.cut())
    for path in [one for one in (world.home / "blobs" / "payloads").rglob("*") if one.is_file()]:
        damage(path)
    world.do(world.restart())


@damages
def test_of_a_run(world: World, damage: Callable[[Path], None]):
    run, other = world.next_seq
    world.do(world.cut())
    large = {"forward_backward": forward_backward(range(1, INLINE_BYTES // 4))}
    submit(world, run, large, UPDATE, GRADIENT, UPDATE)
    submit(world, other, GRADIENT)
    restart_with(world, damage)
    world.finish()
    assert outcomes(world, run) == [
        *("CHECKSUM_MISMATCH", "WINDOW_POISONED"),
        *("SUCCEEDED", "SUCCEEDED"),
    ]
    assert outcomes(world, other) == ["SUCCEEDED"]


@damages
def test_of_no_run(world: World, damage: Callable[[Path], None]):
    run, _ = world.next_seq
    world.do(world.cut())
    operations: list[Any] = []
    for number, text in enumerate(["x", "x" * INLINE_BYTES]):
        message = sample(1)
        message.prompts[0].text = text
        message.weights.base_model = "any"
        operations.append(
            training.OperationSpec(request_id=f"request-large-{number}", sample=message)
        )
    world.do(world.send(operations))
    submit(world, run, GRADIENT)
    restart_with(world, damage)
    world.finish()
    states = {row.request_id: bool(row.error) for row in world.rows(None)}
    assert states == {"request-large-0": False, "request-large-1": True}
    assert outcomes(world, run) == ["SUCCEEDED"]


@damages
def test_of_a_save_that_was_made(world: World, damage: Callable[[Path], None]):
    run, _ = world.next_seq
    save = training.SaveState()
    save.metadata["note"] = "x" * (INLINE_BYTES - 30)  # as much as may be
    submit(world, run, {"save_state": save})
    world.do(world.deliver())
    while world.worker.execute():
        pass
    for path in [one for one in (world.home / "blobs" / "payloads").rglob("*") if one.is_file()]:
        damage(path)
    submit(world, run, GRADIENT)
    world.finish()
    assert outcomes(world, run) == ["CHECKSUM_MISMATCH", "SUCCEEDED"]


@damages
def test_of_a_result(world: World, damage: Callable[[Path], None]):
    """Whoever watches from before it hears of what came after it."""
    run, _ = world.next_seq
    ids = submit(
        world, run, {"forward_backward": forward_backward(range(1, INLINE_BYTES // 3))}, UPDATE
    )
    world.finish()
    for row in world.rows(run):
        if row.result_ref:
            damage(world.home / "blobs" / row.result_ref)
    told = world.told()
    assert [operation.id for operation in told] == ids
    assert [operation.result_pruned for operation in told] == [True, False]


def test_what_was_not_accepted_leaves_no_file(world: World):
    """Nor what was accepted before, and is sent again."""
    run, _ = world.next_seq
    world.do(world.cut())
    large = {"forward_backward": forward_backward(range(1, INLINE_BYTES // 4))}
    submit(world, run, large)

    def files() -> list[str]:
        return [key for key, _ in world.blobs.sizes("payloads/")]

    [kept] = files()
    spec = training.OperationSpec(run_id=run, seq=1, **large)
    [again] = world.do(world.send([spec]))
    assert again.repeated
    spec.forward_backward.loss.name = "cross_entropy"
    [conflict] = world.do(world.send([spec]))
    assert conflict.error is not None
    spec.seq = 2
    spec.forward_backward.batch.inline.ClearField("offsets")
    [refused] = world.do(world.send([spec]))
    assert refused.error is not None
    assert files() == [kept]

    async def read_only(*_: object) -> None:
        raise TenSafeFault("STORAGE_UNAVAILABLE", "the disk is read-only", retry_delay_s=0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.coordinator.intake._gate, "stored", read_only)
        with pytest.raises(TenSafeFault):
            world.do(world.send([training.OperationSpec(run_id=run, seq=3, **large)]))
    assert files() == [kept]


def test_where_the_disk_is_broken(world: World, monkeypatch: pytest.MonkeyPatch):
    run, other = world.next_seq
    world.do(world.cut())
    large = {"forward_backward": forward_backward(range(1, INLINE_BYTES // 4))}
    submit(world, run, large, UPDATE)
    submit(world, other, GRADIENT)
    world.do(world.cut())

    def get(_blobs: LocalBlobStore, _key: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalBlobStore, "get", get)
    world.do(world.restart())
    world.finish()
    assert outcomes(world, run) == ["CHECKSUM_MISMATCH", "WINDOW_POISONED"]
    assert outcomes(world, other) == ["SUCCEEDED"]


def executed(world: World) -> None:
    world.do(world.deliver())
    while world.worker.execute():
        pass


def test_a_large_result_that_no_file_takes_is_kept_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    run, other = world.next_seq
    submit(world, run, GRADIENT)
    submit(world, other, GRADIENT)
    executed(world)

    def put(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(payloads, "INLINE_BYTES", 1)
        patch.setattr(LocalBlobStore, "put", put)
        world.do(world.report())
    world.finish()
    assert outcomes(world, run) == outcomes(world, other) == ["SUCCEEDED"]


def test_a_save_waits_for_what_it_was_to_do(world: World, monkeypatch: pytest.MonkeyPatch):
    run, other = world.next_seq
    submit(world, run, {"save_state": training.SaveState()})
    submit(world, other, GRADIENT)
    executed(world)
    specs, left = world.store.specs, [2]

    async def read(ids: list[str]) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return await specs(ids)

    monkeypatch.setattr(outcomes_module, "_RETRY_S", 0.0)
    monkeypatch.setattr(world.store, "specs", read)
    world.do(world.report())
    world.finish()
    assert left == [0]
    assert outcomes(world, run) == outcomes(world, other) == ["SUCCEEDED"]
