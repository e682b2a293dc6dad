"""What a waiting operation was to do is gone from the blob store, or is not what was stored there:
that operation fails and says so, and the service and all others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault.order_world import World, forward_backward, sample
from fault.test_order_moves import GRADIENT, UPDATE, outcomes, submit

from tensafe.v1 import training_pb2 as training
from tensafe_server.blobs.payloads import INLINE_BYTES


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
