"""While the server drains: what is refused and what is answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_status import rpc_status

from tensafe.v1 import admin_pb2 as admin
from tensafe.v1 import operations_pb2, operations_pb2_grpc, training_pb2, training_pb2_grpc
from tensafe.wire.channel import client_options
from tensafe.wire.status import from_status
from tensafe_server.app import Coordinator, Settings


def test_a_draining_server_refuses_what_is_new_and_says_when_to_come_back(tmp_path: Path):
    async def main() -> None:
        coordinator = await Coordinator.start(Settings(tmp_path, "127.0.0.1:0"))
        tenant = await coordinator.identity.create_tenant("a")
        _, key = await coordinator.identity.create_key(admin.KEY_KIND_TENANT, tenant.id, "k")
        metadata = (("authorization", f"Bearer {key}"),)
        target = f"127.0.0.1:{coordinator.port}"
        async with grpc.aio.insecure_channel(target, options=client_options()) as channel:
            training = training_pb2_grpc.TrainingServiceStub(channel)
            spec = training_pb2.OperationSpec(run_id="run-1", seq=1)
            batch = training_pb2.SubmitBatchRequest(operations=[spec])
            answer = await training.SubmitBatch(batch, metadata=metadata)
            assert answer.outcomes[0].HasField("error")
            await coordinator.drain()
            for call in (
                training.SubmitBatch(batch, metadata=metadata),
                training.Submit(training_pb2.SubmitRequest(operation=spec), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
                assert status is not None
                detail = from_status(status)
                assert (detail.code, detail.reason) == ("UNAVAILABLE", "DRAINING")
                assert detail.retry_delay_s
            listing = await operations_pb2_grpc.OperationsServiceStub(channel).ListOperations(
                operations_pb2.ListOperationsRequest(), metadata=metadata
            )
            assert not listing.operations
        await coordinator.stop(1)

    asyncio.run(main())
