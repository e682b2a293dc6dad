"""What a running sample has drawn, and what its readers get of it: all of it once, in little
memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import decode, encode
from tensafe_server.operations.model import PendingOperation
from tensafe_server.operations.streaming import SampleStreams
from tensafe_server.operations.transcripts import (
    Place,
    RowKey,
    Transcript,
    ended_transcript,
)

Tokens = list[int]


def text_of(tokens: Tokens) -> str:
    return "".join("äöüßéñ"[token % 6] for token in tokens)  # each of two bytes


def chunks(tokens: Tokens, cuts: list[int], row: int = 0) -> list[ops.TokenChunk]:
    """A completion in pieces, whose text comes one token late."""
    text = text_of(tokens)
    edges = sorted({0, *[cut % (len(tokens) + 1) for cut in cuts], len(tokens)})
    parts = [(a, tokens[a:b], text[max(0, a - 1) : b - 1]) for a, b in pairwise(edges)]
    parts.append((len(tokens), [], text[max(0, len(tokens) - 1) :]))
    return [
        ops.TokenChunk(
            sample_index=row,
            position=position,
            tokens=encode(np.asarray(part, np.int32)),
            logprobs=encode(np.asarray(part, np.float32)),
            raw_logprobs=encode(np.asarray(part, np.float32)),
            text=letters,
        )
        for position, part, letters in parts
    ]


def result_of(rows: list[Tokens]) -> ops.SampleResult:
    return ops.SampleResult(
        completions=[
            ops.Completion(
                sample_index=row,
                tokens=encode(np.asarray(tokens, np.int32)),
                logprobs=encode(np.asarray(tokens, np.float32)),
                raw_logprobs=encode(np.asarray(tokens, np.float32)),
                completion=text_of(tokens),
            )
            for row, tokens in enumerate(rows)
        ]
    )


@dataclass
class Reader:
    """Puts together what it gets, as the proto says: position 0 begins a completion anew."""

    places: dict[RowKey, Place] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    begun: int = 0

    def read(self, transcript: Transcript) -> None:
        for page in transcript.since(self.places, 64):
            for chunk in page:
                self.take(chunk)
        assert not list(transcript.since(self.places, 64))

    def take(self, chunk: ops.TokenChunk) -> None:
        row, new = chunk.sample_index, decode(chunk.tokens).tolist()
        if chunk.position == 0:
            self.tokens[row], self.text[row] = [], ""
            self.begun += 1
        assert len(self.tokens[row]) == chunk.position
        self.tokens[row] += new
        self.text[row] += chunk.text
        assert decode(chunk.logprobs).tolist() == new


TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=8)
PASSES = st.lists(
    st.tuples(st.booleans(), TOKENS, st.lists(st.integers(0, 8)), st.integers(1, 9)), max_size=5
)


@settings(deadline=None)
@given(TOKENS, PASSES, st.lists(st.integers(0, 5), max_size=3), TOKENS)
def test_readers_get_the_result_however_workers_come_and_go(first, passes, joins, other):
    """A pass is what one worker sends: the same again, or, from another execution, maybe not."""
    transcript, readers, tokens = Transcript(), [Reader()], first
    for number, (again, different, cuts, sent) in enumerate(passes):
        readers += [Reader() for join in joins if join == number]
        if not again:
            tokens = different
        for chunk in chunks(tokens, cuts)[:sent]:
            transcript.take(chunk)
            readers[-1].read(transcript)
        for reader in readers[::2]:
            reader.read(transcript)
    rows = [tokens, other]  # nobody has heard of the second before the end
    for reader in readers:
        whole = ended_transcript(result_of(rows), transcript, reader.places)
        reader.read(whole)
        assert reader.tokens == dict(enumerate(rows))
        assert reader.text == {row: text_of(one) for row, one in enumerate(rows)}
    if all(again for again, *_ in passes):
        assert all(reader.begun == 2 for reader in readers)  # each completion once


def test_what_comes_behind_a_hole_is_passed_over_until_it_begins_anew():
    transcript, reader = Transcript(), Reader()
    [first, second, third, last] = chunks([1, 2, 3], [1, 2])
    transcript.take(first)
    transcript.take(third)
    reader.read(transcript)
    assert reader.tokens == {0: [1]}
    for chunk in (first, second, third, last):
        transcript.take(chunk)
    reader.read(transcript)
    assert reader.tokens == {0: [1, 2, 3]}
    assert reader.begun == 1


def test_pages_are_bounded():
    transcript = Transcript()
    for row in range(20):
        for chunk in chunks([1] * 50, [], row):
            transcript.take(chunk)
    pages = list(transcript.since({}, 1000))
    assert len(pages) > 5
    assert all(sum(chunk.ByteSize() for chunk in page) < 2000 for page in pages)
    assert sum(map(len, pages)) == 20


class FakeReader:
    """An `OperationReader` of one sample."""

    def __init__(self, kind: int = ops.OPERATION_KIND_SAMPLE) -> None:
        row = cast(Any, type("Row", (), {"id": "op-1", "kind": kind, "tenant_id": "t"})())
        self.pending: PendingOperation | None = PendingOperation(row, None, "m")
        self.message = ops.Operation(id="op-1", kind=kind)  # type: ignore[arg-type]

    async def operation(self, tenant_id: str, operation_id: str) -> ops.Operation:
        if (tenant_id, operation_id) != ("t", "op-1"):
            raise TenSafeFault("OPERATION_NOT_FOUND", "no such operation")
        return self.message

    def unfinished(self, tenant_id: str, operation_id: str) -> PendingOperation | None:
        return self.pending

    def end(self, rows: list[Tokens]) -> None:
        assert self.pending is not None
        self.message.result.sample.CopyFrom(result_of(rows))
        self.message.state = ops.OPERATION_STATE_SUCCEEDED
        self.pending.notify_finished()


def streams_of(fake: FakeReader, most: int = 9) -> SampleStreams:
    return SampleStreams(cast(Any, fake), most)


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_slow_reader_and_a_fast_one_share_one_transcript():
    async def main() -> None:
        fake = FakeReader()
        streams = streams_of(fake)
        pending = fake.pending
        assert pending is not None
        slow, fast = streams.stream("t", "op-1"), streams.stream("t", "op-1")
        reader, late = Reader(), Reader()
        got = asyncio.ensure_future(anext(fast))
        await turn()
        for chunk in chunks([1, 2, 3], [1, 2])[:3]:
            pending.take_tokens(chunk)
            for one in (await got).chunks:
                reader.take(one)
            got = asyncio.ensure_future(anext(fast))
            await turn()
        assert reader.tokens == {0: [1, 2, 3]}
        # The slow one reads now, and gets in one piece what the other got in three.
        [one] = (await anext(slow)).chunks
        late.take(one)
        assert late.tokens == {0: [1, 2, 3]}
        assert pending.transcript is not None
        assert len(pending.transcript.readers) == 2
        fake.end([[1, 2, 3]])
        for one in (await got).chunks:  # the text that was held back
            reader.take(one)
        assert reader.text == {0: text_of([1, 2, 3])}
        last = await anext(fast)
        assert last.operation.state == ops.OPERATION_STATE_SUCCEEDED
        assert [response async for response in fast] == []
        await slow.aclose()
        assert not pending.transcript.readers

    asyncio.run(main())


def test_one_that_comes_when_it_has_ended_gets_all_of_it():
    async def main() -> None:
        fake = FakeReader()
        fake.end([[1, 2], [3]])
        fake.pending = None
        responses = [one async for one in streams_of(fake).stream("t", "op-1")]
        reader = Reader()
        for response in responses[:-1]:
            for chunk in response.chunks:
                reader.take(chunk)
        assert reader.tokens == {0: [1, 2], 1: [3]}
        assert responses[-1].operation.id == "op-1"

    asyncio.run(main())


@pytest.mark.parametrize("named", [("t", "op-2"), ("other", "op-1")])
def test_a_foreign_or_unknown_one_is_not_found(named: tuple[str, str]):
    async def main() -> None:
        with pytest.raises(TenSafeFault) as raised:
            await anext(streams_of(FakeReader()).stream(*named))
        assert raised.value.detail.reason == "OPERATION_NOT_FOUND"

    asyncio.run(main())


def test_only_samples_are_streamed():
    async def main() -> None:
        fake = FakeReader(ops.OPERATION_KIND_OPTIM_STEP)
        with pytest.raises(TenSafeFault) as raised:
            await anext(streams_of(fake).stream("t", "op-1"))
        assert raised.value.detail.metadata["field"] == "operation_id"

    asyncio.run(main())


def test_a_tenant_has_so_many_streams_and_others_have_their_own():
    async def main() -> None:
        fake = FakeReader()
        streams = streams_of(fake, most=2)

        async def refused() -> None:
            with pytest.raises(TenSafeFault) as raised:
                await anext(streams.stream("t", "op-1"))
            detail = raised.value.detail
            assert (detail.reason, detail.metadata["limit"]) == ("QUEUE_FULL", "tenant_streams")
            assert detail.metadata["resource"] == "tenants/t"
            assert detail.retry_delay_s

        first, second = streams.stream("t", "op-1"), streams.stream("t", "op-1")
        waiting = [asyncio.ensure_future(anext(one)) for one in (first, second)]
        await turn()
        await refused()
        with pytest.raises(TenSafeFault, match="no such operation"):
            await anext(streams.stream("other", "op-1"))  # not that it were full
        waiting[0].cancel()  # its caller goes away
        await turn()
        third = asyncio.ensure_future(anext(streams.stream("t", "op-1")))
        await turn()
        await refused()
        fake.end([[1]])
        for one in (waiting[1], third):
            assert (await one).chunks
        assert [response async for response in second][-1].HasField("operation")
        fake.pending = None
        assert [response async for response in streams.stream("t", "op-1")]

    asyncio.run(main())


def test_readers_are_sent_away_when_the_server_stops():
    async def main() -> None:
        streams = streams_of(FakeReader())
        waiting = asyncio.ensure_future(anext(streams.stream("t", "op-1")))
        await turn()
        streams.close()
        with pytest.raises(TenSafeFault) as raised:
            await waiting
        assert raised.value.detail.reason == "DRAINING"
        with pytest.raises(TenSafeFault):
            await anext(streams.stream("t", "op-1"))

    asyncio.run(main())
