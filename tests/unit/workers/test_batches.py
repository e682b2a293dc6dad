"""Batches: what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tensafe.wire.status import TenSafeFault
from workers.engine import batches
from workers.engine.batches import ScoredBatch
from workers.losses.cross_entropy import cross_entropy
from workers.operations import Batch, LossRequest, Reduction

VOCABULARY, CONTEXT = 50, 16


def check_batch(request: LossRequest) -> ScoredBatch:
    reduction = cross_entropy.card.resolve_reduction(request.reduction, "reduction")
    return batches.check_batch(request, cross_entropy, reduction, VOCABULARY, CONTEXT)


def request(lengths: list[int], weights=None, **changes) -> LossRequest:
    count = sum(lengths)
    fields = {
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "input_tokens": np.arange(count, dtype=np.int32) % VOCABULARY,
        "target_tokens": (np.arange(count, dtype=np.int32) + 1) % VOCABULARY,
        "weights": np.ones(count, np.float32)
        if weights is None
        else np.asarray(weights, np.float32),
    } | changes
    return LossRequest(Batch(**fields))


BAD = [
    ({"offsets": np.asarray([0, 3], np.int64)}, "INVALID_BATCH", "batch.offsets"),
    ({"offsets": np.asarray([1, 6], np.int64)}, "INVALID_BATCH", "batch.offsets"),
    ({"offsets": np.asarray([0, 4, 2, 6], np.int64)}, "INVALID_BATCH", "batch.offsets"),
    ({"offsets": np.asarray([0, 3, 3, 6], np.int64)}, "INVALID_BATCH", "batch.offsets"),
    ({"offsets": np.asarray([0], np.int64)}, "INVALID_BATCH", "batch.offsets"),
    ({"target_tokens": None}, "INVALID_BATCH", "batch"),
    ({"target_tokens": np.zeros(5, np.int32)}, "INVALID_BATCH", "batch.target_tokens"),
    ({"weights": np.ones(7, np.float32)}, "INVALID_BATCH", "batch.weights"),
    ({"weights": np.full(6, np.nan, np.float32)}, "INVALID_BATCH", "batch.weights"),
    ({"weights": np.full(6, np.inf, np.float32)}, "INVALID_BATCH", "batch.weights"),
    ({"weights": np.zeros(6, np.float32)}, "NOTHING_SCORED", "batch.weights"),
    ({"weights": np.asarray([1, 1, 1, 1, 1, -1], np.float32)}, "INVALID_BATCH", "batch.weights"),
    (
        {"input_tokens": np.asarray([0, 1, 2, 3, 4, 50], np.int32)},
        "TOKEN_OUT_OF_RANGE",
        "batch.input_tokens",
    ),
    (
        {"input_tokens": np.asarray([0, -1, 2, 3, 4, 5], np.int32)},
        "TOKEN_OUT_OF_RANGE",
        "batch.input_tokens",
    ),
    (
        {"target_tokens": np.asarray([0, 1, 2, 3, 4, 50], np.int32)},
        "TOKEN_OUT_OF_RANGE",
        "batch.target_tokens",
    ),
]


@pytest.mark.parametrize(("changes", "reason", "field"), BAD)
def test_bad_batches_name_the_field(changes, reason, field):
    with pytest.raises(TenSafeFault) as caught:
        check_batch(request([2, 4], **changes))
    assert caught.value.detail.reason == reason
    assert caught.value.detail.metadata["field"] == field


def test_a_row_beyond_the_context():
    with pytest.raises(TenSafeFault) as caught:
        check_batch(request([2, 17]))
    assert caught.value.detail.reason == "CONTEXT_EXCEEDED"
    assert "datum 1" in str(caught.value)


@pytest.mark.parametrize("field", ["input_tokens", "target_tokens"])
def test_a_token_out_of_range_is_named_by_its_datum(field):
    batch = request([2, 4, 3], [1, 0, 1, 1, 0, 1, 1, 1, 1])
    tokens = np.asarray([0, 1, 2, 3, 4, 50, 6, 7, 8], np.int32)
    setattr(batch.batch, field, tokens)
    with pytest.raises(TenSafeFault) as caught:
        check_batch(batch)
    facts = caught.value.detail.metadata
    assert (facts["datum"], facts["position"], facts["token_id"]) == ("1", "3", "50")


def test_unscored_targets_may_hold_filler_and_no_weights_score_all():
    batch = request([3], [0, 1, 1])
    batch.batch.target_tokens = np.asarray([-100, 1, 2], np.int32)
    assert check_batch(batch).scored == 2
    batch = request([3])
    batch.batch.weights = None
    assert check_batch(batch).denominator == 3.0


def test_weights_that_cancel_need_the_sum_reduction():
    cancelling = request([2], [1, -1])
    cancelling.reduction = Reduction.SUM
    assert check_batch(cancelling).denominator == 1.0
