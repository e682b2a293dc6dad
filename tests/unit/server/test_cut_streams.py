"""A stream whose caller is gone ends in silence, and what fed it is closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import pytest

from tensafe_server.api import guard


class GoneContext:
    """Of a call whose second write finds nobody."""

    def __init__(self) -> None:
        self.written: list[str] = []

    async def write(self, response: str) -> None:
        if self.written:
            raise grpc.aio.InternalError("ExecuteBatchError")
        self.written.append(response)


def test_a_caller_that_is_gone_is_nothing_to_log(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    closed: list[bool] = []

    async def watch(request: object, context: object) -> AsyncIterator[str]:
        try:
            while True:
                yield "event"
        finally:
            closed.append(True)

    handler = SimpleNamespace(
        response_streaming=True,
        request_streaming=False,
        stream_stream=None,
        stream_unary=None,
        unary_stream=watch,
        unary_unary=None,
        request_deserializer=None,
        response_serializer=None,
    )
    serve = guard._guarded(handler, "/tensafe.v1.OperationsService/Watch").unary_stream
    context = GoneContext()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(serve(SimpleNamespace(), context))
    assert context.written == ["event"]
    assert closed == [True]
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
