"""Operations over a stream that stays open: what ends it, and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from tensafe.v1 import admin_pb2 as admin
from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import training_pb2_grpc
from tensafe.wire.channel import client_options
from tensafe.wire.status import ErrorDetail, from_status
from tensafe_server.app import Coordinator, Settings


@dataclass
class Stream:
    coordinator: Coordinator
    key_id: str
    call: Any

    async def ask(self, *seqs: int) -> list[str]:
        """Sends optimizer steps; their ids, or the reason of the first that was refused."""
        specs = [
            pb.OperationSpec(run_id="run-1", seq=seq, optim_step=pb.OptimStep()) for seq in seqs
        ]
        batch = pb.SubmitBatchRequest(operations=specs)
        await self.call.write(pb.SubmitStreamRequest(batch=batch))
        outcomes = (await self.call.read()).batch.outcomes
        return [
            from_status(one.error).reason if one.HasField("error") else one.operation_id
            for one in outcomes
        ]

    async def end(self) -> ErrorDetail:
        """How the stream ends."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call.read()
        status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
        assert status is not None
        return from_status(status)


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Stream]:
    coordinator = await Coordinator.start(Settings(directory, "127.0.0.1:0"))
    tenant = await coordinator.identity.create_tenant("a")
    row, key = await coordinator.identity.create_key(admin.KEY_KIND_TENANT, tenant.id, "k")
    metadata = (("authorization", f"Bearer {key}"),)
    target = coordinator.address.removeprefix("grpc://")
    async with grpc.aio.insecure_channel(target, options=client_options()) as channel:
        training = training_pb2_grpc.TrainingServiceStub(channel)
        call = training.SubmitStream(metadata=metadata)
        try:
            yield Stream(coordinator, row.id, call)
        finally:
            call.cancel()
            await coordinator.stop(60)


def with_a_stream(directory: Path, test: Callable[[Stream], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(directory) as stream:
            await test(stream)

    asyncio.run(main())


def test_each_request_is_answered_and_the_stream_stays_open(tmp_path: Path):
    async def test(stream: Stream) -> None:
        assert await stream.ask(1, 2) == ["RUN_NOT_FOUND", "RUN_NOT_FOUND"]
        assert await stream.ask(1) == ["RUN_NOT_FOUND"]

    with_a_stream(tmp_path, test)


def test_a_stream_ends_with_its_key(tmp_path: Path):
    async def test(stream: Stream) -> None:
        await stream.ask(1)
        await stream.coordinator.identity.revoke_key(stream.key_id)
        await stream.call.write(pb.SubmitStreamRequest())
        assert (await stream.end()).reason == "UNAUTHENTICATED"

    with_a_stream(tmp_path, test)


def test_a_request_that_breaks_a_rule_ends_the_stream(tmp_path: Path):
    async def test(stream: Stream) -> None:
        await stream.call.write(pb.SubmitStreamRequest(batch=pb.SubmitBatchRequest()))
        end = await stream.end()
        assert end.reason == "INVALID_ARGUMENT"
        assert [field for field, _ in end.violations] == ["batch.operations"]

    with_a_stream(tmp_path, test)


def test_a_draining_server_takes_nothing_more_over_a_stream(tmp_path: Path):
    async def test(stream: Stream) -> None:
        await stream.ask(1)
        await stream.coordinator.drain()
        spec = pb.OperationSpec(run_id="run-1", seq=1)
        batch = pb.SubmitBatchRequest(operations=[spec])
        await stream.call.write(pb.SubmitStreamRequest(batch=batch))
        assert (await stream.end()).reason == "DRAINING"

    with_a_stream(tmp_path, test)


def test_a_server_that_stops_ends_a_stream_that_waits(tmp_path: Path):
    async def test(stream: Stream) -> None:
        await stream.ask(1)
        stopping = asyncio.ensure_future(stream.coordinator.stop(60))
        assert (await stream.end()).reason == "DRAINING"
        await stopping

    with_a_stream(tmp_path, test)
