"""Calls of one method that overlap are each their own caller's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tensafe.v1 import admin_pb2 as admin
from tensafe_server.api.guard import Guard, caller
from tensafe_server.tenants.identity import Principal

_SERVICE = "tensafe.v1.TrainingService"
_TENANTS = ["ten-1", "ten-2", "ten-3"]


def _authenticate(secret: str) -> Principal | None:
    if secret not in _TENANTS:
        return None
    return Principal(admin.KEY_KIND_TENANT, secret, f"key of {secret}")


async def _ask(calls: Any, tenant_id: str) -> list[str]:
    call = calls(b"", metadata=(("authorization", f"Bearer {tenant_id}"),))
    if hasattr(call, "__aiter__"):
        return [answer.decode() async for answer in call]
    return [(await call).decode()]


def test_callers_of_one_method_are_not_taken_for_one_another():
    async def main() -> None:
        all_here = asyncio.Barrier(len(_TENANTS))

        async def unary(request: object, context: object) -> bytes:
            async with all_here:
                return caller().tenant_id.encode()

        async def stream(request: object, context: object) -> AsyncIterator[bytes]:
            for _ in range(3):
                async with all_here:
                    yield caller().tenant_id.encode()

        server = grpc.aio.server(
            interceptors=[Guard(SimpleNamespace(authenticate=_authenticate))]  # type: ignore[arg-type]
        )
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(unary, bytes),
            "Stream": grpc.unary_stream_rpc_method_handler(stream, bytes),
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for calls, times in (
                (channel.unary_unary(f"/{_SERVICE}/Unary"), 1),
                (channel.unary_stream(f"/{_SERVICE}/Stream"), 3),
            ):
                for _ in range(2):
                    told = await asyncio.gather(*(_ask(calls, tenant) for tenant in _TENANTS))
                    assert told == [[tenant] * times for tenant in _TENANTS]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _ask(calls, "ten-4")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await server.stop(None)

    asyncio.run(asyncio.wait_for(main(), 30))
