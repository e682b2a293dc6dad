"""The one call over which a session submits: it stays open, so that each batch costs one message
each way. Where it breaks off, the next batch opens another."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from tensafe.v1 import training_pb2 as pb
from tensafe_client.channel import Stubs

_Call = grpc.aio.StreamStreamCall[bytes, pb.SubmitStreamResponse]
_Metadata = tuple[tuple[str, str], ...]


class SubmitStream:
    """One batch at a time; on the loop.

    Args:
        metadata: of the call.
        timeout_s: longest wait for an answer.
    """

    def __init__(self, metadata: _Metadata, timeout_s: float) -> None:
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._call: _Call | None = None

    async def send(self, stubs: Stubs, request: bytes) -> pb.SubmitBatchResponse:
        """Sends a serialized SubmitStreamRequest and returns its answer.

        Raises:
            grpc.aio.AioRpcError: as a call of its own would; the batch may have been taken.
        """
        call, self._call = self._call, None
        if call is None or call.done():
            call = stubs.submit_stream(metadata=self._metadata)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await _ask(call, request)
        except TimeoutError:
            call.cancel()
            text = f"no answer to a batch within {self._timeout_s:g} s"
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
        except BaseException:
            call.cancel()
            raise
        self._call = call
        return response.batch

    def close(self) -> None:
        """Ends the call."""
        if self._call is not None:
            self._call.cancel()


async def _ask(call: _Call, request: bytes) -> pb.SubmitStreamResponse:
    with contextlib.suppress(asyncio.InvalidStateError):  # it has ended; reading says why
        await call.write(request)
    response: Any = await call.read()
    if response is grpc.aio.EOF:
        raise _error(grpc.StatusCode.UNAVAILABLE, "the server ended the stream")
    return response  # type: ignore[no-any-return]


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
