"""How an uploaded dataset lies in its tenant's folder: any unit is read without the others.

`records` has the rows one after another, `index` where each begins, in the order of their units,
and `units` at which row of the index each unit begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tensafe.v1 import training_pb2 as training
from tensafe.v1.datasets_pb2 import Dataset
from tensafe.v1.types_pb2 import DATA_TYPE_FLOAT32, DATA_TYPE_INT32, DATA_TYPE_INT64, Tensor
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array
from tensafe_server.blobs.base import BlobStore
from tensafe_server.privacy.rows import MOST_UNIT_TOKENS, Row

_TOKEN_BYTES = 12
_WRITE_BYTES = 2**20
_MESSAGE_TOKENS = MOST_UNIT_TOKENS


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first look at all rows has found.

    Attributes:
        order: int64 [n]: rows in the order of their units; their own, if they have none.
        units: int64 [U + 1]: where each unit begins in that order; None without unit ids.
        lengths: int64 [n]: tokens of each row.
    """

    dataset: Dataset
    order: Array
    units: Array | None
    lengths: Array


def survey(rows: Iterable[Row]) -> Survey:
    """Looks at all rows, and makes the dataset's id of them: whatever their order, the same.

    Raises:
        TenSafeFault: INVALID_DATASET for a row, or for a unit of too many tokens.
    """
    digests: list[bytes] = []
    lengths: list[int] = []
    of_row: list[int] = []
    numbers: dict[str, int] = {}
    largest = 0
    for row in rows:
        digests.append(row.digest())
        lengths.append(len(row.tokens))
        largest = max(largest, int(row.tokens.max()), int(row.targets.max()))
        if row.unit_id is not None:
            of_row.append(numbers.setdefault(row.unit_id, len(numbers)))
    sizes = np.asarray(lengths, np.int64)
    order, units = np.arange(len(sizes)), None
    if of_row:
        owners = np.asarray(of_row)
        order = np.argsort(owners, kind="stable")
        units = np.searchsorted(owners[order], np.arange(len(numbers) + 1))
        _check_units(np.add.reduceat(sizes[order], units[:-1]), list(numbers))
    total = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    dataset = Dataset(
        id=f"ds-{total[:32]}",
        examples=len(sizes),
        tokens=int(sizes.sum()),
        longest=int(sizes.max()),
        largest_token=largest,
        sha256=total,
    )
    if units is not None:
        dataset.unit_ids = len(numbers)
    return Survey(dataset, order, units, sizes)


def _check_units(tokens: Array, names: list[str]) -> None:
    worst = int(tokens.argmax())
    if tokens[worst] > MOST_UNIT_TOKENS:
        raise TenSafeFault(
            "INVALID_DATASET",
            f"unit_id {names[worst]!r} has {tokens[worst]} tokens in all; a unit may have "
            f"{MOST_UNIT_TOKENS}. Split it, or leave some of its rows out",
            field="unit_id",
        )


class DatasetFiles:
    """The files of one dataset. All calls block."""

    def __init__(self, blobs: BlobStore, tenant_id: str, dataset_id: str) -> None:
        self._blobs = blobs
        self._prefix = f"datasets/{tenant_id}/{dataset_id}/"

    def write(self, rows: Iterable[Row], found: Survey) -> int:
        """Lays the surveyed rows out; returns the bytes that they take."""
        writer = self._blobs.writer(f"{self._prefix}records")
        held = bytearray()
        try:
            for row in rows:
                held += row.record()
                if len(held) >= _WRITE_BYTES:
                    writer.write(bytes(held))
                    held.clear()
            writer.write(bytes(held))
            writer.commit()
        finally:
            writer.abort()
        begins = np.zeros(len(found.lengths) + 1, np.int64)
        np.cumsum(found.lengths * _TOKEN_BYTES, out=begins[1:])
        index = np.stack([begins[:-1][found.order], found.lengths[found.order]], axis=1)
        self._blobs.put(f"{self._prefix}index", index.astype("<i8").tobytes())
        if found.units is not None:
            self._blobs.put(f"{self._prefix}units", found.units.astype("<i8").tobytes())
        return sum(size for _, size in self._blobs.sizes(self._prefix))

    def delete(self) -> None:
        for key in [key for key, _ in self._blobs.sizes(self._prefix)]:
            self._blobs.delete(key)

    def open(self, *, by_unit: bool) -> DatasetReader:
        """Reads what is needed to find any unit: a row, or all rows of one unit id."""
        index = np.frombuffer(self._blobs.get(f"{self._prefix}index"), "<i8").reshape(-1, 2)
        units = np.arange(len(index) + 1)
        if by_unit:
            units = np.frombuffer(self._blobs.get(f"{self._prefix}units"), "<i8")

        def read(begin: int, size: int) -> bytes:
            return next(self._blobs.read(f"{self._prefix}records", begin, size))

        return DatasetReader(index, units, read)


class DatasetReader:
    """Reads units of a dataset.

    Args:
        index: int64 [n, 2]: where each row begins in the records, bytes, and its tokens.
        units: int64 [U + 1].
        read: bytes of the records from a position.
    """

    def __init__(self, index: Array, units: Array, read: Callable[[int, int], bytes]) -> None:
        self._index = index
        self._units = units
        self._read = read

    @property
    def count(self) -> int:
        """How many units there are."""
        return len(self._units) - 1

    def batches(self, chosen: Array) -> Iterator[tuple[training.Batch, Tensor]]:
        """The rows of some units as batches with their units' numbers, each unit in one batch."""
        rows: list[int] = []
        numbers: list[int] = []
        tokens = unit = 0
        for one in chosen.tolist():
            begin, end = int(self._units[one]), int(self._units[one + 1])
            size = int(self._index[begin:end, 1].sum())
            if rows and tokens + size > _MESSAGE_TOKENS:
                yield self._batch(rows, numbers)
                rows, numbers, tokens, unit = [], [], 0, 0
            rows += range(begin, end)
            numbers += [unit] * (end - begin)
            tokens += size
            unit += 1
        if rows:
            yield self._batch(rows, numbers)

    def _batch(self, rows: list[int], numbers: list[int]) -> tuple[training.Batch, Tensor]:
        parts: list[list[bytes]] = [[], [], []]
        for row in rows:
            begin, size = (int(one) for one in self._index[row])
            record = self._read(begin, _TOKEN_BYTES * size)
            for place, part in enumerate(parts):
                part.append(record[4 * size * place : 4 * size * (place + 1)])
        offsets = np.zeros(len(rows) + 1, "<i8")
        np.cumsum(self._index[rows, 1], out=offsets[1:])
        total = int(offsets[-1])
        tokens, targets, weights = (b"".join(part) for part in parts)
        batch = training.Batch()
        _fill(batch.offsets, DATA_TYPE_INT64, len(offsets), offsets.tobytes())
        _fill(batch.input_tokens, DATA_TYPE_INT32, total, tokens)
        add = batch.loss_inputs.add
        _fill(add(name="target_tokens").tensor, DATA_TYPE_INT32, total, targets)
        _fill(add(name="weights").tensor, DATA_TYPE_FLOAT32, total, weights)
        units = Tensor()
        _fill(units, DATA_TYPE_INT32, len(numbers), np.asarray(numbers, "<i4").tobytes())
        return batch, units


def _fill(tensor: Tensor, dtype: int, count: int, data: bytes) -> None:
    tensor.dtype = dtype  # type: ignore[assignment]
    tensor.shape.append(count)
    tensor.data = data
