"""Cutting calls into passes loses and repeats nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.batches import ScoredBatch, check_batch
from workers.engine.packing import pack
from workers.engine.passes import cut
from workers.losses import Loss
from workers.losses.cross_entropy import cross_entropy
from workers.losses.dpo import dpo
from workers.operations import Batch, LossRequest

VOCABULARY, CONTEXT = 50, 16
ROWS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=16), min_size=1, max_size=6
).filter(lambda rows: any(any(row) for row in rows))


def batch_of(rows: list[list[float]], loss: Loss = cross_entropy) -> ScoredBatch:
    weights = np.concatenate([np.asarray(row, np.float32) for row in rows])
    tokens = np.arange(len(weights), dtype=np.int32) % VOCABULARY
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    targets = (tokens + 1) % VOCABULARY
    request = LossRequest(Batch(offsets, tokens, targets, weights))
    return check_batch(request, loss, loss.card.reductions[0], VOCABULARY, CONTEXT)


@given(st.lists(ROWS, min_size=1, max_size=4), st.integers(1, 60))
def test_every_scored_position_is_in_one_pass(calls, budget):
    batches = [batch_of(rows) for rows in calls]
    seen: list[list[np.ndarray]] = [[] for _ in batches]
    for work in cut(batches, budget):
        assert len(work.ids) <= budget or len(work.lengths) == 1
        assert sum(work.lengths) == len(work.ids) == len(work.positions) == len(work.rows)
        ends = [share.tokens.stop for share in work.shares]
        begins = [share.tokens.start for share in work.shares]
        assert begins == [0, *ends[:-1]]
        assert ends[-1] == len(work.ids)
        for share in work.shares:
            batch = batches[share.call]
            seen[share.call].append(share.sources)
            places = work.scored[share.scored]
            np.testing.assert_array_equal(work.ids[places], batch.tokens[share.sources])
            parts = np.split(share.sources, np.cumsum(share.counts)[:-1])
            for row, own in zip(share.rows, parts, strict=True):
                assert ((batch.offsets[row] <= own) & (own < batch.offsets[row + 1])).all()
            assert sum(share.counts) == len(share.sources)
            # Each token's datum and place are its own, whatever lies around it.
            rows, positions = work.rows[share.tokens], work.positions[share.tokens]
            sources = batch.offsets[rows] + positions
            np.testing.assert_array_equal(work.ids[share.tokens], batch.tokens[sources])
            assert set(rows.tolist()) == set(share.rows)
    for batch, sources in zip(batches, seen, strict=True):
        np.testing.assert_array_equal(
            np.sort(np.concatenate(sources)), np.flatnonzero(batch.weights)
        )


PAIRS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9).map(lambda row: [*row, 1.0]),
    min_size=1,
    max_size=4,
).map(lambda rows: [*rows, *rows[::-1]])


@given(st.lists(PAIRS, min_size=1, max_size=3), ROWS, st.integers(1, 60))
def test_rows_that_belong_together_are_never_separated(pairs, others, budget):
    batches = [*(batch_of(rows, dpo) for rows in pairs), batch_of(others)]
    seen = [0] * len(batches)
    for work in cut(batches, budget):
        one = len(work.lengths) == batches[work.shares[0].call].together
        assert work.is_one_unit == one
        assert len(work.ids) <= budget or one
        for share in work.shares:
            seen[share.call] += len(share.rows)
            if batches[share.call].together == 2:
                assert share.rows[1::2] == [row + 1 for row in share.rows[0::2]]
                assert not any(row % 2 for row in share.rows[0::2])
    assert seen[:-1] == [len(rows) for rows in pairs]


def test_a_call_is_cut_alike_whatever_order_its_equal_rows_have():
    (work,) = cut([batch_of([[1.0] * 3, [1.0] * 9, [1.0] * 3])], 100)
    assert work.lengths == [9, 3, 3]
    assert work.shares[0].rows == [1, 0, 2]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=12))
def test_buckets_cover_all_documents_in_order(lengths):
    packing = pack(lengths, "cpu")
    assert packing.borders.tolist() == np.cumsum([0, *lengths]).tolist()
    assert sum(bucket.count for bucket in packing.buckets.members) == len(lengths)
    begin = 0
    documents = iter(lengths)
    for bucket in packing.buckets.members:
        own = [next(documents) for _ in range(bucket.count)]
        assert (bucket.begin, bucket.end) == (begin, begin + sum(own))
        assert all(length <= bucket.length < length + 16 for length in own)
        if bucket.places is not None:
            expected = [row * bucket.length + i for row, n in enumerate(own) for i in range(n)]
            assert bucket.places.tolist() == expected
        else:
            assert set(own) == {bucket.filled}
        begin = bucket.end
