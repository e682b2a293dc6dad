"""Checks a batch and cuts it into passes of padded rows.

The result does not depend on the cut but for float rounding: the loss is a sum over positions, and
a causal model's position sees nothing to its right, so neither padding there nor a row's tail
after its last scored position matters, and both can be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensafe.wire.status import TenSafeFault
from workers.operations import Float32, Int32, Int64, LossRequest, Reduction

_DENSE_TOKENS = 256
_LEAST_FILL = 0.75


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
    """

    offsets: Int64
    tokens: Int32
    targets: Int32
    weights: Float32
    denominator: float
    scored: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that go through the model together, padded on the right with token 0.

    Attributes:
        rows: int32 [R], each row's index in its batch.
        input_ids: int64 [R, T].
        positions: int64 [S], where the scored positions lie in the flattened [R·T].
        sources: int64 [S], where they lie in the batch's [N].
        targets: int64 [S].
        weights: float32 [S].
    """

    rows: Int32
    input_ids: Int64
    positions: Int64
    sources: Int64
    targets: Int64
    weights: Float32


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
    check_tokens(batch.input_tokens, vocabulary_size, "batch.input_tokens")
    if not np.isfinite(weights).all():
        raise _invalid("batch.weights", "a weight is NaN or infinite; use finite weights")
    scored = weights != 0
    # What is not scored may hold any filler, such as −100.
    check_tokens(batch.target_tokens[scored], vocabulary_size, "batch.target_tokens")
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
    )


def check_tokens(tokens: Int32, vocabulary_size: int, field: str) -> None:
    """Refuses ids that the embedding has no row for.

    Raises:
        TenSafeFault: TOKEN_OUT_OF_RANGE, naming the first such id and its place.
    """
    outside = (tokens < 0) | (tokens >= vocabulary_size)
    if outside.any():
        place = int(outside.argmax())
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"{field} has token id {tokens[place]} at {place}; the model's ids are 0 to "
            f"{vocabulary_size - 1}; use this model's tokenizer",
            field=field,
            token_id=int(tokens[place]),
            vocabulary_size=vocabulary_size,
        )


def split(batch: ScoredBatch, token_budget: int) -> list[Pass]:
    """Cuts a batch into passes of at most `token_budget` padded tokens, or of one row.

    Rows of like length go together, and rows without a scored position are left out.
    """
    ends = _last_scored(batch)
    order = [int(row) for row in np.argsort(-ends, kind="stable") if ends[row] > 0]
    passes: list[list[int]] = []
    padded_to = real = 0
    for row in order:
        length = int(ends[row])
        current = passes[-1] if passes else None
        fits = current is not None and (len(current) + 1) * padded_to <= token_budget
        sparse = real >= _DENSE_TOKENS and length < _LEAST_FILL * padded_to
        if current is None or not fits or sparse:
            passes.append([row])
            padded_to, real = length, length
        else:
            current.append(row)
            real += length
    return [_pass(batch, rows, ends) for rows in passes]


def _pass(batch: ScoredBatch, rows: list[int], ends: Int64) -> Pass:
    longest = int(max(ends[row] for row in rows))
    input_ids = np.zeros((len(rows), longest), np.int64)
    positions, sources = [], []
    for index, row in enumerate(rows):
        begin, length = int(batch.offsets[row]), int(ends[row])
        input_ids[index, :length] = batch.tokens[begin : begin + length]
        scored = np.flatnonzero(batch.weights[begin : begin + length])
        positions.append(scored + index * longest)
        sources.append(scored + begin)
    source = np.concatenate(sources)
    return Pass(
        rows=np.asarray(rows, np.int32),
        input_ids=input_ids,
        positions=np.concatenate(positions),
        sources=source,
        targets=batch.targets[source].astype(np.int64),
        weights=batch.weights[source],
    )


def _last_scored(batch: ScoredBatch) -> Int64:
    """int64 [B]: tokens of each row up to its last scored position; 0 without one."""
    ends = np.zeros(len(batch.offsets) - 1, np.int64)
    for row, (begin, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        scored = np.flatnonzero(batch.weights[begin:end])
        ends[row] = scored[-1] + 1 if len(scored) else 0
    return ends


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
