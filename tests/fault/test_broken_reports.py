"""A worker's stream breaks while its report is taken in: what was told counts, nothing hangs."""

from __future__ import annotations

import asyncio

import pytest
from fault.order_moves import UPDATE, outcomes, submit
from fault.order_world import World, forward_backward

from tensafe.v1 import worker_pb2 as pb
from tensafe_server.api.worker import WorkerServicer
from tensafe_server.blobs.payloads import INLINE_BYTES, Payloads


async def report_and_break(world: World) -> None:
    """The stream ends while a result is written to a file."""
    parts = world.coordinator
    servicer = WorkerServicer(
        *(world.store, world.blobs, parts.models, parts.reception, parts.book, parts.privacy.draws)
    )
    requests: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
    planned, writing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def arriving():
        while True:
            yield await requests.get()

    async def serve() -> None:
        async for message in servicer.Connect(arriving(), None):
            world.worker.take([message])
            if message.plan.operations:
                planned.set()

    save = Payloads.save

    async def slow(payloads: Payloads, tenant_id: str, data: bytes):
        if len(data) > INLINE_BYTES:
            writing.set()
            await go_on.wait()
        return await save(payloads, tenant_id, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Payloads, "save", slow)
        serving = asyncio.get_running_loop().create_task(serve())
        await requests.put(pb.ConnectRequest(register=world.worker.register()))
        await planned.wait()
        while world.worker.execute():
            pass
        await requests.put(pb.ConnectRequest(report=world.worker.report()))
        await writing.wait()
        serving.cancel()
        await asyncio.wait([serving])
        go_on.set()
        await world._settle()


def test_a_result_that_is_being_written_counts(world: World):
    [run] = world.next_seq
    world.do(world.cut())
    submit(world, run, {"forward_backward": forward_backward(range(1, INLINE_BYTES // 3))})
    world.do(report_and_break(world))
    assert outcomes(world, run) == ["SUCCEEDED"]
    world.do(world.kill_worker())
    submit(world, run, UPDATE)
    world.finish()
    assert outcomes(world, run) == ["SUCCEEDED"] * 2
    assert world.coordinator.replays.mismatches == 0
