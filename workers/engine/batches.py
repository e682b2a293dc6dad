"""Checks a batch before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import place_in_batch
from workers.operations import Float32, Int32, Int64, LossRequest, Reduction


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A batch that was checked, with its weights filled in.

    Attributes:
        offsets: int64 [B + 1].
        tokens: int32 [N].
        targets: int32 [N].
        weights: float32 [N].
        denominator: Σ weights, in float64.
        scored: positions whose weight is not 0.
        ends: int64 [B], tokens of each row up to its last scored position; 0 without one.
    """

    offsets: Int64
    tokens: Int32
    targets: Int32
    weights: Float32
    denominator: float
    scored: int
    ends: Int64


def check_batch(request: LossRequest, vocabulary_size: int, context_length: int) -> ScoredBatch:
    """Everything that could harm the run, or the runs beside it, is refused here.

    Raises:
        TenSafeFault: INVALID_BATCH, TOKEN_OUT_OF_RANGE, CONTEXT_EXCEEDED, NOTHING_SCORED.
    """
    batch = request.batch
    count = len(batch.input_tokens)
    _check_offsets(batch.offsets, count)
    if batch.target_tokens is None:
        raise _invalid("batch.target_tokens", "cross_entropy needs target_tokens; add them")
    weights = batch.weights if batch.weights is not None else np.ones(count, np.float32)
    for name, array in (("target_tokens", batch.target_tokens), ("weights", weights)):
        if len(array) != count:
            raise _invalid(
                f"batch.{name}",
                f"it has {len(array)} elements and input_tokens has {count}; give one per token",
            )
    check_tokens(batch.input_tokens, vocabulary_size, "batch.input_tokens", batch.offsets)
    if not np.isfinite(weights).all():
        raise _invalid("batch.weights", "a weight is NaN or infinite; use finite weights")
    scored = weights != 0
    # What is not scored may hold any filler, such as −100.
    targets = np.where(scored, batch.target_tokens, 0)
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
    denominator = float(weights.sum(dtype=np.float64))
    _check_weights(weights, denominator, int(scored.sum()), request.reduction)
    return ScoredBatch(
        batch.offsets,
        batch.input_tokens,
        batch.target_tokens,
        weights,
        denominator,
        int(scored.sum()),
        _last_scored(batch.offsets, weights),
    )


def check_tokens(
    tokens: Int32, vocabulary_size: int, field: str, offsets: Int64 | None = None
) -> None:
    """Refuses ids that the embedding has no row for.

    Args:
        offsets: int64 [B + 1] if the tokens are those of B datums.

    Raises:
        TenSafeFault: TOKEN_OUT_OF_RANGE, naming the first such id, its datum and its place there.
    """
    outside = (tokens < 0) | (tokens >= vocabulary_size)
    if outside.any():
        place = int(outside.argmax())
        where = f"position {place}"
        facts: dict[str, Any] = {"position": place}
        if offsets is not None:
            datum, position = place_in_batch(offsets, place)
            where = f"position {position} of datum {datum}"
            facts = {"datum": datum, "position": position}
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"{field} has token id {tokens[place]} at {where}; the model's ids are 0 to "
            f"{vocabulary_size - 1}; use this model's tokenizer",
            field=field,
            token_id=int(tokens[place]),
            vocabulary_size=vocabulary_size,
            **facts,
        )


def _last_scored(offsets: Int64, weights: Float32) -> Int64:
    places = np.where(weights != 0, np.arange(1, len(weights) + 1), 0)
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


def _check_weights(weights: Float32, denominator: float, scored: int, reduction: Reduction) -> None:
    if not scored:
        raise TenSafeFault(
            "NOTHING_SCORED",
            "every weight of the batch is 0; score at least one token (labels other than -100)",
            field="batch.weights",
        )
    if reduction is Reduction.WEIGHTED_MEAN and (weights < 0).any():
        raise _invalid(
            "batch.weights", "a weight is negative, which needs the sum reduction; set it"
        )
    if not np.isfinite(denominator):
        raise _invalid("batch.weights", "the weights' sum is not finite; use smaller weights")


def _invalid(field: str, text: str) -> TenSafeFault:
    return TenSafeFault("INVALID_BATCH", f"{field}: {text}", field=field)
