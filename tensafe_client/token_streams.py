"""Samples as they are drawn: what `sample(stream=True)` gives, and its asyncio twin.

The server sends every completion from its first token on, also to one that comes back after a
break, so that only here is known what the caller has seen.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc

from tensafe.v1 import operations_pb2 as pb
from tensafe_client.backoff import Backoff, retryable
from tensafe_client.errors import SampleDivergedError, ServerError, TenSafeError, from_rpc_error
from tensafe_client.futures import OperationFuture
from tensafe_client.samples import Sample, SampleChunk, SampleResult
from tensafe_client.streams import Source

if TYPE_CHECKING:
    from tensafe_client.session import Session


@dataclass(slots=True)
class _Completion:
    """What has come of one: all of it, and how much of it over the present stream."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    coming_tokens: int = 0
    coming_text: int = 0


class Received:
    """What a caller has of a sample, so that each token reaches it once."""

    def __init__(self, operation_id: str) -> None:
        self._operation_id = operation_id
        self._completions: dict[tuple[int, int], _Completion] = {}

    def take(self, message: pb.TokenChunk) -> SampleChunk | None:
        """What a chunk has that did not come before; None if nothing.

        Raises:
            SampleDivergedError: it differs from what came before.
        """
        chunk = SampleChunk.from_proto(message)
        key = chunk.prompt_index, chunk.sample_index
        have = self._completions.setdefault(key, _Completion())
        if chunk.position == 0:
            have.coming_tokens = have.coming_text = 0
        if chunk.position != have.coming_tokens:
            raise ServerError(
                f"the server sent token {chunk.position} of a completion of {self._operation_id} "
                f"after token {have.coming_tokens - 1}"
            )
        tokens = chunk.tokens.tolist()
        known = have.tokens[chunk.position : chunk.position + len(tokens)]
        known_text = have.text[have.coming_text : have.coming_text + len(chunk.text)]
        if known != tokens[: len(known)] or not chunk.text.startswith(known_text):
            raise self._diverged(key, chunk.position + _first_difference(known, tokens))
        have.tokens += tokens[len(known) :]
        have.text += chunk.text[len(known_text) :]
        have.coming_tokens += len(tokens)
        have.coming_text += len(chunk.text)
        fresh = chunk.after(len(known), len(known_text))
        return fresh if len(fresh.tokens) or fresh.text else None

    def check(self, result: pb.SampleResult) -> None:
        """Raises SampleDivergedError if what came is not the result: it came out shorter."""
        for message in result.completions:
            key = message.prompt_index, message.sample_index
            have, whole = self._completions.get(key, _Completion()), Sample.from_proto(message)
            if have.tokens != whole.tokens.tolist() or have.text != whole.completion:
                raise self._diverged(key, len(whole.tokens))

    def _diverged(self, key: tuple[int, int], token: int) -> SampleDivergedError:
        return SampleDivergedError(
            f"{self._operation_id} was executed again, since its worker was lost, and came out "
            f"differently: completion {key[1]} of prompt {key[0]} from token {token} on",
            metadata={"operation_id": self._operation_id},
        )


def _first_difference(known: list[int], tokens: list[int]) -> int:
    pairs = zip(known, tokens, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(known))


async def drawn(
    session: Session, future: OperationFuture[SampleResult]
) -> AsyncGenerator[list[SampleChunk], None]:
    """Yields what is drawn until the sample has ended; goes on after a break; on the loop.

    Raises:
        TenSafeError: what the operation failed with.
        SampleDivergedError: it was executed again and came out differently.
    """
    operation_id = await session.operations.identified(future)
    if operation_id is None:
        future.check()
        return
    backoff = Backoff()
    received = Received(operation_id)
    while True:
        delay_s = None
        stubs = await session.stubs()  # says so if the client was closed meanwhile
        request = pb.StreamSampleRequest(operation_id=operation_id)
        call = stubs.operations.StreamSample(request, metadata=session.metadata)
        try:
            async for response in call:
                backoff.reset()
                fresh = [chunk for one in response.chunks if (chunk := received.take(one))]
                if fresh:
                    yield fresh
                if response.HasField("operation"):
                    session.operations.ended(future, response.operation)
                    future.check()
                    received.check(response.operation.result.sample)
                    return
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            if not retryable(error):
                raise failure from None
            delay_s = failure.retry_delay_s
        finally:
            call.cancel()  # grpc.aio does not cancel a call that is merely dropped
        await asyncio.sleep(backoff.next_s(delay_s))


class _Stream:
    """What both faces share."""

    def __init__(self, session: Session, future: OperationFuture[SampleResult]) -> None:
        self.future = future
        self._session = session
        self._source = Source(drawn(session, future))
        self._fresh: deque[SampleChunk] = deque()
        self._ended = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.future!r}>"

    def _take(self, chunks: list[SampleChunk] | None) -> bool:
        """Takes in what came; False at the end."""
        self._ended = chunks is None
        self._fresh.extend(chunks or ())
        return not self._ended

    async def _leave(self) -> None:
        await self._source.close()
        if not self.future.done():
            await self._session.cancel_operation(self.future)


class SampleStream(_Stream):
    """Iterates a sample's tokens as they are drawn, and has the whole result at the end.

        with tc.sample("Once upon a time", stream=True) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            print(stream.result().samples[0].finish_reason)

    Chunks of several completions come interleaved; `prompt_index` and `sample_index` tell which is
    whose. Each token comes once, also through restarts of the server and the loss of a worker.

    **Leaving early cancels the sample**: a `break` out of the loop, `close()`, the end of the
    `with` block. Read slowly, and the tokens wait on the server; sampling goes on.

    Attributes:
        future: the operation.

    Iterating raises what the operation fails with, and SampleDivergedError if it was executed again
    after its worker was lost and drew other tokens; `result()` then has the valid ones.
    """

    def __iter__(self) -> Iterator[SampleChunk]:
        try:
            while (chunk := next(self, None)) is not None:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> SampleChunk:
        while not self._fresh:
            if self._ended:
                raise StopIteration
            try:
                self._take(self._session.io.run(self._source.next()))
            except TenSafeError:
                self._ended = True
                raise
        return self._fresh.popleft()

    def result(self, timeout: float | None = None) -> SampleResult:
        """Waits for the whole result; as `OperationFuture.result`."""
        return self.future.result(timeout)

    def cancel(self) -> bool:
        """Stops the sample; as `OperationFuture.cancel`."""
        return self.future.cancel()

    def close(self) -> None:
        """Ends the stream; a sample that goes on is cancelled."""
        if not self._ended:
            self._ended = True
            self._session.io.run(self._leave())
        self._fresh.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncSampleStream(_Stream):
    """As `SampleStream`, for `async for` and `async with`."""

    async def __aiter__(self) -> AsyncIterator[SampleChunk]:
        try:
            while (chunk := await anext(self, None)) is not None:
                yield chunk
        finally:
            await self.close()

    async def __anext__(self) -> SampleChunk:
        while not self._fresh:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._take(await self._session.io.bridge(self._source.next()))
            except TenSafeError:
                self._ended = True
                raise
        return self._fresh.popleft()

    async def result(self) -> SampleResult:
        """Waits for the whole result."""
        return await self.future

    async def cancel(self) -> bool:
        """Stops the sample; as `OperationFuture.cancel`."""
        if self.future.done():
            return self.future.cancelled()
        return await self._session.io.bridge(self._session.cancel_operation(self.future))

    async def close(self) -> None:
        """Ends the stream; a sample that goes on is cancelled."""
        if not self._ended:
            self._ended = True
            await self._session.io.bridge(self._leave())
        self._fresh.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
