"""What of a checked batch is another thing in a private run."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from workers.engine.batches import ScoredBatch
from workers.operations import Int32, Int64


def private_batch(
    batch: ScoredBatch, reduction: Reduction, units: Int32 | None, least_tokens: int
) -> ScoredBatch:
    """Nothing that is computed of a row depends on the rows beside it: not whether it is there, nor
    its dropout masks.

    Args:
        units: int32 [B], as in `operations.Batch`; None: each row is a unit.
        least_tokens: what a row takes of a pass's tokens at least, for its unit's gradient.

    Raises:
        TenSafeFault: INVALID_BATCH.
    """
    count = len(batch.ends)
    if units is None:
        units = np.arange(count, dtype=np.int32)
    if len(units) != count or (units < -1).any():
        raise TenSafeFault(
            "INVALID_BATCH",
            f"batch.units: it must have one number of at least -1 for each of the {count} datums",
            field="batch.units",
        )
    counts = units >= 0
    rows = np.searchsorted(batch.offsets, batch.places, side="right") - 1
    ends = np.where(counts, batch.ends, 0)
    return replace(
        batch,
        places=batch.places[counts[rows]],
        ends=ends,
        denominator=1.0 if reduction is Reduction.SUM else float((ends > 0).sum()),
        row_keys=_content_keys(batch),
        # Only those that count are looked at; numbers without gaps make small tables.
        units=np.unique(units, return_inverse=True)[1].astype(np.int64),
        least_tokens=least_tokens,
    )


def _content_keys(batch: ScoredBatch) -> Int64:
    """int64 [B] in int32's range, of each row's own tokens. Its place would not do: whether
    another row is there must change no mask."""
    rows = np.split(batch.tokens, batch.offsets[1:-1])
    sums = np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32)
    return sums.view(np.int32).astype(np.int64)
