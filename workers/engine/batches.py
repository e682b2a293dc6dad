"""Checks a batch before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe.wire.loss_tensors import check_tensors, is_scored
from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import place_in_batch
from workers.losses import Loss
from workers.operations import Float32, Int32, Int64, LossRequest

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A batch that was checked, with its weights filled in.

    Attributes:
        offsets: int64 [B + 1].
        tokens: int32 [N].
        targets: int32 [N] or [N, K]; 0 where the weight is 0.
        weights: float32, like the targets.
        inputs: what else the loss takes, by name: [N] or [N, K].
        places: int64 [S], the scored positions, in order.
        shares: float64 [B], what the terms of each datum are multiplied by under the reduction;
            None for 1.
        denominator: what the sum of all terms is to be divided by; 1 for a sum.
        ends: int64 [B], tokens of each row up to its last scored position; 0 without one.
        together: rows after one another that no pass may separate.
        row_keys: int64 [B] in int32's range, what tells the rows' dropout masks apart.
        units: int64 [B], the privacy unit of each row, whose rows are computed after one another;
            None: there are none.
        least_tokens: what a row takes of a pass's tokens at least.
    """

    offsets: Int64
    tokens: Int32
    targets: Int32
    weights: Float32
    inputs: dict[str, NDArray[Any]]
    places: Int64
    shares: Float64 | None
    denominator: float
    ends: Int64
    together: int
    row_keys: Int64
    units: Int64 | None = None
    least_tokens: int = 0

    @property
    def scored(self) -> int:
        """Positions with a weight other than 0."""
        return len(self.places)


def check_batch(
    request: LossRequest,
    loss: Loss,
    reduction: Reduction,
    vocabulary_size: int,
    context_length: int,
) -> ScoredBatch:
    """Everything that could harm the run, or the runs beside it, is refused here.

    Args:
        reduction: one that the loss has.

    Raises:
        TenSafeFault: INVALID_BATCH, TOKEN_OUT_OF_RANGE, CONTEXT_EXCEEDED, NOTHING_SCORED.
    """
    batch = request.batch
    count = len(batch.input_tokens)
    _check_offsets(batch.offsets, count)
    tensors = batch.tensors()
    loss.card.check_inputs(list(tensors), "batch")
    check_tensors(loss.card, tensors, batch.offsets, reduction, lambda name: f"batch.{name}")
    check_tokens(batch.input_tokens, vocabulary_size, "batch.input_tokens", batch.offsets)
    targets = tensors.pop("target_tokens")
    weights = tensors.pop("weights", None)
    if weights is None:
        weights = np.ones(count, np.float32)
    # What is not scored may hold any filler, such as −100.
    targets = np.where(weights != 0, targets, 0)
    check_tokens(targets, vocabulary_size, "batch.target_tokens", batch.offsets)
    lengths = np.diff(batch.offsets)
    longest = int(lengths.max())
    if longest > context_length:
        row = int(lengths.argmax())
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"datum {row} has {longest} tokens and the model's context is {context_length}; "
            "shorten or split it",
            field="batch.input_tokens",
            context_length=context_length,
        )
    scored = is_scored(weights)
    shares, denominator = _reduce(loss, reduction, batch.offsets, weights, scored)
    return ScoredBatch(
        offsets=batch.offsets,
        tokens=batch.input_tokens,
        targets=targets,
        weights=weights,
        inputs=tensors,
        places=np.flatnonzero(scored),
        shares=shares,
        denominator=denominator,
        ends=_last_scored(batch.offsets, scored),
        together=loss.card.datums_together,
        row_keys=np.arange(len(lengths)),
    )


def _reduce(
    loss: Loss, reduction: Reduction, offsets: Int64, weights: Float32, scored: NDArray[np.bool_]
) -> tuple[Float64 | None, float]:
    """Each datum's share, and the denominator; see the proto's LossReduction."""
    if reduction is Reduction.SUM:
        return None, 1.0
    if loss.per == "sequence":
        sequences = int(np.logical_or.reduceat(scored, offsets[:-1]).sum())
        return None, sequences / loss.card.datums_together
    counts = weights if loss.card.divides_by_weights else scored
    if counts.ndim > 1:
        counts = counts.sum(1, dtype=np.float64)
    if reduction is Reduction.TOKEN_MEAN:
        return None, float(counts.sum(dtype=np.float64))
    per_datum = np.add.reduceat(counts, offsets[:-1], dtype=np.float64)
    some = per_datum != 0
    return np.divide(1.0, per_datum, where=some, out=np.zeros(len(per_datum))), float(some.sum())


def check_tokens(
    tokens: Int32, vocabulary_size: int, field: str, offsets: Int64 | None = None
) -> None:
    """Refuses ids that the embedding has no row for.

    Args:
        tokens: [N] or [N, K].
        offsets: int64 [B + 1] if the tokens are those of B datums.

    Raises:
        TenSafeFault: TOKEN_OUT_OF_RANGE, naming the first such id, its datum and its place there.
    """
    outside = (tokens < 0) | (tokens >= vocabulary_size)
    if outside.any():
        first = tuple(np.argwhere(outside)[0])
        place = int(first[0])
        where = f"position {place}"
        facts: dict[str, Any] = {"position": place}
        if offsets is not None:
            datum, position = place_in_batch(offsets, place)
            where = f"position {position} of datum {datum}"
            facts = {"datum": datum, "position": position}
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"{field} has token id {tokens[first]} at {where}; the model's ids are 0 to "
            f"{vocabulary_size - 1}; use this model's tokenizer",
            field=field,
            token_id=int(tokens[first]),
            vocabulary_size=vocabulary_size,
            **facts,
        )


def _last_scored(offsets: Int64, scored: NDArray[np.bool_]) -> Int64:
    places = np.where(scored, np.arange(1, len(scored) + 1), 0)
    last = np.maximum.reduceat(places, offsets[:-1])
    return np.where(last > 0, last - offsets[:-1], 0)


def _check_offsets(offsets: Int64, count: int) -> None:
    # Compared, not subtracted: differences of int64 may wrap.
    rising = len(offsets) > 1 and bool((offsets[1:] > offsets[:-1]).all())
    if not rising or offsets[0] != 0 or offsets[-1] != count:
        raise _invalid(
            "batch.offsets",
            f"they must rise strictly from 0 to the {count} input tokens, one step per datum",
        )


def _invalid(field: str, text: str) -> TenSafeFault:
    return TenSafeFault("INVALID_BATCH", f"{field}: {text}", field=field)
