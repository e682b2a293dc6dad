"""Uploaded rows: what is taken, what is refused by its line, and how they are found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import decode, encode
from tensafe_client import Datum
from tensafe_client.dataset_uploads import _write
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.privacy import layout
from tensafe_server.privacy.layout import DatasetFiles, survey
from tensafe_server.privacy.rows import BATCHES, JSONL, Row, read_rows

ROWS = [
    {"tokens": [1, 2, 3], "target_tokens": [2, 3, 4], "unit_id": "a"},
    {"tokens": [5], "target_tokens": [6], "weights": [0.5], "unit_id": "b"},
    {"tokens": [7, 8], "target_tokens": [8, 9], "weights": [0, 1], "unit_id": "a"},
]


def jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def in_pieces(data: bytes, size: int = 7) -> Iterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


def rows_of(rows: list[Any]) -> list[Row]:
    return list(read_rows(JSONL, in_pieces(jsonl(rows))))


def test_jsonl_and_batches_are_the_same_rows(tmp_path: Path) -> None:
    datums = [
        Datum(row["tokens"], row["target_tokens"], row.get("weights"), unit_id=row["unit_id"])
        for row in ROWS
    ]
    _write(tmp_path / "rows", datums)
    batches = list(read_rows(BATCHES, in_pieces((tmp_path / "rows").read_bytes())))
    found = rows_of(ROWS)
    assert [row.digest() for row in found] == [row.digest() for row in batches]
    assert [row.weights.tolist() for row in found] == [[1, 1, 1], [0.5], [0, 1]]


def test_equal_content_is_one_dataset_whatever_its_order() -> None:
    one = survey(rows_of(ROWS)).dataset
    other = survey(rows_of(ROWS[::-1])).dataset
    assert one.id == other.id
    assert (one.examples, one.unit_ids, one.tokens) == (3, 2, 6)
    assert (one.longest, one.largest_token) == (3, 9)
    for change in ({"tokens": [1, 2, 4]}, {"unit_id": "c"}, {"weights": [1, 1, 0]}):
        assert survey(rows_of([ROWS[0] | change, *ROWS[1:]])).dataset.id != one.id
    assert survey(rows_of([*ROWS, ROWS[0]])).dataset.id != one.id


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"tokens": [], "target_tokens": []}, "tokens"),
        ({"tokens": [1], "target_tokens": [1, 2]}, "target_tokens"),
        ({"tokens": [1.5], "target_tokens": [1]}, "tokens"),
        ({"tokens": [True], "target_tokens": [1]}, "tokens"),
        ({"tokens": [-1], "target_tokens": [1]}, "tokens"),
        ({"tokens": [2**31], "target_tokens": [1]}, "tokens"),
        ({"tokens": [1], "target_tokens": [1], "weights": [-1]}, "weights"),
        ({"tokens": [1], "target_tokens": [1], "weights": [1e300]}, "weights"),
        ({"tokens": [1], "target_tokens": [1], "weights": "x"}, "weights"),
        ({"tokens": [1], "target_tokens": [1], "unit_id": 5}, "unit_id"),
        ({"tokens": [1], "target_tokens": [1], "unit_id": ""}, "unit_id"),
        ({"tokens": [1], "target_tokens": [1], "extra": 5}, "extra"),
        ({"text": "hello"}, "text"),
        ([1, 2], "line"),
        ({"tokens": [1], "target_tokens": [1], "unit_id": "a"}, "unit_id"),
        ({"tokens": [1], "target_tokens": [2], "unit_id": "\ud800"}, "unit_id"),
        ({"tokens": [1], "target_tokens": [2], "weights": [10**400]}, "weights"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(row: Any, field: str) -> None:
    good = {"tokens": [1], "target_tokens": [2]}
    with pytest.raises(TenSafeFault, match="line 3") as caught:
        rows_of([good, good, row])
    assert caught.value.detail.reason == "INVALID_DATASET"
    assert caught.value.detail.metadata["field"] == field


_INT, _WIDE = np.arange(4, dtype="<i4"), np.arange(8, dtype="<i4").reshape(4, 2)


@pytest.mark.parametrize(
    ("tokens", "targets", "weights", "offsets"),
    [
        (_WIDE, _WIDE, np.ones((4, 2), "<f4"), np.array([0, 2, 4])),
        (_INT, _WIDE, np.ones(4, "<f4"), np.array([0, 2, 4])),
        (_INT, _INT[:0], None, np.array([0, 2, 4])),
        (_INT, _INT[:3], None, np.array([0, 2, 4])),
        (_INT, _INT, np.ones(3, "<f4"), np.array([0, 2, 4])),
        (_INT[1], _INT, None, np.array([0, 1])),
        (_INT, _INT, None, np.array([0.0, 2.0, 4.0])),
        (_INT, _INT, None, np.array([0, 2, 4], np.int32)),
    ],
)
def test_a_batch_whose_tensors_do_not_fit_is_refused(
    tokens: Any, targets: Any, weights: Any, offsets: Any
) -> None:
    batch = training.Batch(offsets=encode(offsets), input_tokens=encode(np.asarray(tokens)))
    batch.loss_inputs.add(name="target_tokens", tensor=encode(targets))
    if weights is not None:
        batch.loss_inputs.add(name="weights", tensor=encode(weights))
    data = batch.SerializeToString()
    with pytest.raises(TenSafeFault) as refused:
        list(read_rows(BATCHES, [bytes([len(data) & 0x7F | 0x80, len(data) >> 7]), data]))
    assert refused.value.detail.reason == "INVALID_DATASET"


@pytest.mark.parametrize("data", [b"", b"\n\n", b"{", b"\xff\xfe", b'{"tokens": [1'])
def test_what_is_no_jsonl_is_refused(data: bytes) -> None:
    with pytest.raises(TenSafeFault) as caught:
        list(read_rows(JSONL, [data]))
    assert caught.value.detail.reason == "INVALID_DATASET"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    for name in (JSONL, BATCHES):
        with suppress(TenSafeFault):  # every other error would be INTERNAL
            list(read_rows(name, in_pieces(data)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_unit_is_found_again_whole(data: st.DataObject, tmp_path_factory: Any) -> None:
    by_unit = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    names = ["x", "y", "z"]
    rows = []
    for number, size in enumerate(sizes):
        row: dict[str, Any] = {
            "tokens": [100 * number + position for position in range(size)],
            "target_tokens": list(range(size)),
            "weights": [number + 0.5] * size,
        }
        rows.append(row | ({"unit_id": data.draw(st.sampled_from(names))} if by_unit else {}))
    blobs = LocalBlobStore(tmp_path_factory.mktemp("blobs"))
    files = DatasetFiles(blobs, "ten-1", "ds-1")
    files.write(rows_of(rows), survey(rows_of(rows)))
    reader = files.open(by_unit=by_unit)
    owners = list(dict.fromkeys(row.get("unit_id", n) for n, row in enumerate(rows)))
    assert reader.count == len(owners)
    chosen = data.draw(st.lists(st.sampled_from(range(reader.count)), unique=True).map(sorted))
    most = data.draw(st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_MESSAGE_TOKENS", most)
        found = []
        for batch, units in reader.batches(np.asarray(chosen, np.int64)):
            offsets = decode(batch.offsets).tolist()
            tokens = decode(batch.input_tokens).tolist()
            weights = decode(batch.loss_inputs[1].tensor).tolist()
            numbers = decode(units).tolist()
            assert len(tokens) <= most or set(numbers) == {0}
            assert sorted(set(numbers)) == list(range(max(numbers) + 1))
            base = len({unit for unit, *_ in found})
            for number, begin, end in zip(numbers, offsets, offsets[1:], strict=False):
                found.append((base + number, tokens[begin:end], weights[begin:end]))
    expected = [
        (place, row["tokens"], row["weights"])
        for place, unit in enumerate(chosen)
        for n, row in enumerate(rows)
        if row.get("unit_id", n) == owners[unit]
    ]
    assert found == expected


def test_a_unit_must_fit_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_UNIT_TOKENS", 4)
    with pytest.raises(TenSafeFault, match="'a' has 5 tokens"):
        survey(rows_of(ROWS))
