"""What a running sample has drawn so far: in memory only, once, however many read it.

A reader has no buffer of its own, only its places. A slow one costs nothing but the page that is
being written to it, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from tensafe.v1 import operations_pb2 as pb
from tensafe.v1 import types_pb2 as types

log = logging.getLogger(__name__)

_TOKEN_BYTES = 4
_ENVELOPE_BYTES = 64
RowKey = tuple[int, int]
"""(prompt_index, sample_index) of a completion."""


@dataclass(slots=True)
class Place:
    """How much of a completion a reader has: tokens, bytes of text, and of which version."""

    tokens: int = 0
    text: int = 0
    version: int = 0


@dataclass(slots=True)
class Row:
    """One completion: little-endian buffers, and its text in UTF-8.

    Attributes:
        version: grows when it comes out differently after its worker was lost; readers of an older
            one begin anew.
    """

    tokens: bytearray = field(default_factory=bytearray)
    logprobs: bytearray = field(default_factory=bytearray)
    raw_logprobs: bytearray = field(default_factory=bytearray)
    text: bytearray = field(default_factory=bytearray)
    version: int = 0
    _coming: Place = field(default_factory=Place)

    @classmethod
    def of(cls, completion: pb.Completion) -> Row:
        """A completion that has ended."""
        return cls(
            bytearray(completion.tokens.data),
            bytearray(completion.logprobs.data),
            bytearray(completion.raw_logprobs.data),
            bytearray(completion.completion.encode()),
        )

    def take(self, chunk: pb.TokenChunk) -> bool:
        """Adds what a worker sends, which may begin anew: after a broken stream, or since the
        sample is executed again. False if something is missing before it."""
        coming = self._coming
        if chunk.position == 0:
            coming.tokens = coming.text = 0
        if chunk.position != coming.tokens:
            return False
        begin, text = _TOKEN_BYTES * coming.tokens, chunk.text.encode()
        if not (
            _agrees(self.tokens, begin, chunk.tokens.data) and _agrees(self.text, coming.text, text)
        ):
            self.version += 1
            for buffer in (self.tokens, self.logprobs, self.raw_logprobs):
                del buffer[begin:]
            del self.text[coming.text :]
        _extend(self.tokens, begin, chunk.tokens.data)
        _extend(self.logprobs, begin, chunk.logprobs.data)
        _extend(self.raw_logprobs, begin, chunk.raw_logprobs.data)
        _extend(self.text, coming.text, text)
        coming.tokens += len(chunk.tokens.data) // _TOKEN_BYTES
        coming.text += len(text)
        return True

    def begins_like(self, other: Row, place: Place) -> bool:
        """Whether it has what a reader of another row has up to a place."""
        end = _TOKEN_BYTES * place.tokens
        return (
            place.version == other.version
            and self.tokens[:end] == other.tokens[:end]
            and self.text[: place.text] == other.text[: place.text]
        )

    def since(self, key: RowKey, place: Place) -> pb.TokenChunk | None:
        """What a reader lacks, whose place is moved to the end; None if it has all."""
        if place.version != self.version:
            place.tokens = place.text = 0
            place.version = self.version
        begin = _TOKEN_BYTES * place.tokens
        if begin == len(self.tokens) and place.text == len(self.text):
            return None
        chunk = pb.TokenChunk(
            prompt_index=key[0],
            sample_index=key[1],
            position=place.tokens,
            tokens=_tensor(types.DATA_TYPE_INT32, self.tokens, begin),
            logprobs=_tensor(types.DATA_TYPE_FLOAT32, self.logprobs, begin),
            raw_logprobs=_tensor(types.DATA_TYPE_FLOAT32, self.raw_logprobs, begin),
            text=self.text[place.text :].decode(),
        )
        place.tokens, place.text = len(self.tokens) // _TOKEN_BYTES, len(self.text)
        return chunk


@dataclass(slots=True, eq=False)
class Transcript:
    """A sample's completions so far.

    Attributes:
        readers: set when there is more.
    """

    rows: dict[RowKey, Row] = field(default_factory=dict)
    readers: set[asyncio.Event] = field(default_factory=set)

    def take(self, chunk: pb.TokenChunk) -> None:
        """Adds what a worker sends."""
        key = chunk.prompt_index, chunk.sample_index
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row()
        if not row.take(chunk):
            log.warning("tokens of completion %s from %d on are missing", key, chunk.position)
            return
        for reader in self.readers:
            reader.set()

    def since(self, places: dict[RowKey, Place], limit_bytes: int) -> Iterator[list[pb.TokenChunk]]:
        """What a reader lacks, in pages of about so many bytes; its places move on."""
        page: list[pb.TokenChunk] = []
        size = 0
        for key, row in list(self.rows.items()):
            chunk = row.since(key, places.setdefault(key, Place()))
            if chunk is None:
                continue
            page.append(chunk)
            size += _ENVELOPE_BYTES + 3 * len(chunk.tokens.data) + len(chunk.text)
            if size >= limit_bytes:
                yield page
                page, size = [], 0
        if page:
            yield page


def ended_transcript(
    result: pb.SampleResult, before: Transcript | None, places: dict[RowKey, Place]
) -> Transcript:
    """The whole of a sample that has ended, for a reader that has read `before` up to its places:
    what came out differently begins anew."""
    whole = Transcript()
    for completion in result.completions:
        key = completion.prompt_index, completion.sample_index
        row = whole.rows[key] = Row.of(completion)
        read = before.rows.get(key) if before is not None else None
        place = places.setdefault(key, Place())
        if read is not None and row.begins_like(read, place):
            row.version = place.version
        else:
            row.version = place.version + 1
    return whole


def _agrees(buffer: bytearray, begin: int, data: bytes) -> bool:
    """Whether the buffer has the same from `begin` on, as far as both reach."""
    have = buffer[begin : begin + len(data)]
    return have == data[: len(have)]


def _extend(buffer: bytearray, begin: int, data: bytes) -> None:
    """Adds what lies beyond the buffer's end."""
    buffer += data[len(buffer) - begin :]


def _tensor(dtype: int, buffer: bytearray, begin: int) -> types.Tensor:
    data = bytes(buffer[begin:])
    return types.Tensor(dtype=dtype, shape=[len(data) // _TOKEN_BYTES], data=data)  # type: ignore[arg-type]
