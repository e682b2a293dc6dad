"""The rows of an uploaded dataset: read, checked, and laid out so that any of them can be drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tensafe.v1 import training_pb2 as training
from tensafe.wire.channel import MAX_MESSAGE_BYTES
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, TensorError, decode

JSONL, BATCHES = "rows.jsonl", "rows.batches"
MOST_UNIT_TOKENS = 2**19
"""Tokens of one unit's rows at most: they travel to a worker in one message."""
_MOST_LINE_BYTES = 64 * 2**20
_LARGEST_TOKEN = 2**31 - 1
_FIELDS = {"tokens", "target_tokens", "weights", "unit_id"}


@dataclass(frozen=True, slots=True)
class Row:
    """One example: int32 [T] tokens and targets, float32 [T] weights."""

    tokens: Array
    targets: Array
    weights: Array
    unit_id: str | None

    def record(self) -> bytes:
        """As it is stored: 12 bytes for each token."""
        return self.tokens.tobytes() + self.targets.tobytes() + self.weights.tobytes()

    def digest(self) -> bytes:
        """Of all that it is."""
        unit = b"" if self.unit_id is None else b"u" + self.unit_id.encode()
        size = len(self.tokens).to_bytes(8, "little")
        return hashlib.blake2b(size + self.record() + unit, digest_size=16).digest()


def read_rows(name: str, pieces: Iterable[bytes]) -> Iterator[Row]:
    """The rows of an uploaded file.

    Raises:
        TenSafeFault: INVALID_DATASET, naming the line or message, and the field.
    """
    has_units: bool | None = None
    number = 0
    source = _of_jsonl(pieces) if name == JSONL else _of_batches(pieces)
    for where, row in source:
        number += 1
        if has_units is None:
            has_units = row.unit_id is not None
        elif has_units != (row.unit_id is not None):
            raise _bad(where, "unit_id", "is given for some rows only; give it for all or none")
        yield row
    if not number:
        raise _bad("the file", "rows", "has none")


def _of_jsonl(pieces: Iterable[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(where, "line", f"is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise _bad(where, "line", "must be an object")
        yield where, _of_object(where, value)


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        *whole, rest = held.split(b"\n")
        yield from map(bytes, whole)
        held = bytearray(rest)
        if len(held) > _MOST_LINE_BYTES:
            raise _bad("a line", "line", f"has more than {_MOST_LINE_BYTES} bytes")
    yield bytes(held)


def _of_object(where: str, value: Mapping[str, Any]) -> Row:
    unknown = sorted(value.keys() - _FIELDS)
    if unknown:
        raise _bad(
            where,
            unknown[0],
            "is unknown; a row has tokens, target_tokens, weights and unit_id. Text is made tokens "
            "of by `tensafe datasets upload`",
        )
    arrays = {}
    for name in ("tokens", "target_tokens"):
        given = value.get(name)
        if not isinstance(given, list) or not all(type(one) is int for one in given):
            raise _bad(where, name, "must be a list of token ids")
        arrays[name] = given
    weights = value.get("weights", [1.0] * len(arrays["tokens"]))
    numbers = isinstance(weights, list) and all(type(one) in (int, float) for one in weights)
    if not numbers:
        raise _bad(where, "weights", "must be a list of numbers")
    try:
        weights = np.asarray(weights, np.float64)
    except OverflowError:
        raise _bad(where, "weights", "has a number that is too large") from None
    unit_id = value.get("unit_id")
    if unit_id is not None and not isinstance(unit_id, str):
        raise _bad(where, "unit_id", "must be a text")
    tokens, targets = (_ids(where, name, given) for name, given in arrays.items())
    return _row(where, tokens, targets, weights, unit_id)


def _ids(where: str, name: str, given: list[int]) -> Array:
    if given and not (min(given) >= 0 and max(given) <= _LARGEST_TOKEN):
        raise _bad(where, name, "has a number that is no token id")
    return np.asarray(given, "<i4")


def _of_batches(pieces: Iterable[bytes]) -> Iterator[tuple[str, Row]]:
    for number, data in enumerate(_messages(pieces), 1):
        where = f"batch {number}"
        try:
            batch = training.Batch.FromString(data)
            yield from _of_batch(where, batch)
        except (DecodeError, TensorError) as error:
            raise _bad(where, "batch", f"is malformed: {error}") from error


def _messages(pieces: Iterable[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        while (found := _length(held)) is not None:
            begin, size = found
            if len(held) < begin + size:
                break
            yield bytes(held[begin : begin + size])
            del held[: begin + size]
    if held:
        raise _bad("the file", "batches", "ends within a message")


def _length(data: bytearray) -> tuple[int, int] | None:
    """(bytes of the varint, its value) at the beginning; None while it is not there whole."""
    value = 0
    for position, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            if value > MAX_MESSAGE_BYTES:
                break
            return position + 1, value
    if len(data) < 5 and (not data or data[-1] >= 0x80):
        return None
    raise _bad("a batch", "length", f"is no varint of at most {MAX_MESSAGE_BYTES}")


def _of_batch(where: str, batch: training.Batch) -> Iterator[tuple[str, Row]]:
    offsets = decode(batch.offsets)
    inputs = {item.name: item.tensor for item in batch.loss_inputs}
    unknown = sorted(inputs.keys() - {"target_tokens", "weights"})
    if unknown:
        raise _bad(where, unknown[0], "is unknown; rows have target_tokens and weights")
    if "target_tokens" not in inputs:
        raise _bad(where, "target_tokens", "is missing")
    tokens, targets = decode(batch.input_tokens), decode(inputs["target_tokens"])
    given = inputs.get("weights")
    weights = np.ones(tokens.shape, np.float32) if given is None else decode(given)
    kinds = [array.dtype.str for array in (tokens, targets, weights)]
    if kinds != ["<i4", "<i4", "<f4"]:
        raise _bad(where, "batch", "must have int32 tokens and float32 weights")
    if tokens.ndim != 1 or not tokens.shape == targets.shape == weights.shape:
        raise _bad(where, "batch", "must have one target and one weight for each token, in vectors")
    bounds = offsets.tolist() if offsets.ndim == 1 and offsets.dtype.str == "<i8" else []
    rising = all(begin < end for begin, end in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(tokens) or not rising:
        raise _bad(where, "offsets", "must go from 0 to the number of tokens, strictly increasing")
    if batch.unit_ids and len(batch.unit_ids) != len(offsets) - 1:
        raise _bad(where, "unit_ids", "must have one entry for each row")
    if tokens.min() < 0 or targets.min() < 0:
        raise _bad(where, "tokens", "has a number that is no token id")
    for index, (begin, end) in enumerate(pairwise(bounds)):
        unit_id = batch.unit_ids[index] if batch.unit_ids else None
        part = slice(begin, end)
        at = f"row {index} of {where}"
        yield at, _row(at, tokens[part], targets[part], weights[part], unit_id)


def _row(where: str, tokens: Array, targets: Array, weights: Array, unit_id: str | None) -> Row:
    if not len(tokens):
        raise _bad(where, "tokens", "is empty")
    if len(tokens) > MOST_UNIT_TOKENS:
        raise _bad(where, "tokens", f"has more than {MOST_UNIT_TOKENS} tokens; split it")
    for name, other in (("target_tokens", targets), ("weights", weights)):
        if len(other) != len(tokens):
            raise _bad(where, name, f"has {len(other)} entries for {len(tokens)} tokens")
    with np.errstate(over="ignore"):
        single = weights.astype("<f4")
    if not np.isfinite(single).all() or (single < 0).any():
        raise _bad(where, "weights", "must be finite and not negative")
    if unit_id is not None:
        _check_unit_id(where, unit_id)
    return Row(tokens.astype("<i4"), targets.astype("<i4"), single, unit_id)


def _check_unit_id(where: str, unit_id: str) -> None:
    try:
        size = len(unit_id.encode())
    except UnicodeEncodeError:
        raise _bad(where, "unit_id", "has half a character, which is no text") from None
    if not 1 <= size <= 256:
        raise _bad(where, "unit_id", "must have from 1 to 256 bytes")


def _bad(where: str, field: str, text: str) -> TenSafeFault:
    return TenSafeFault("INVALID_DATASET", f"{where}: {field} {text}", field=field, where=where)
