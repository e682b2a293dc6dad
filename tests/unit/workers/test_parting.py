"""Parts of a pass are the pass, of like size, and the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.batches import ScoredBatch, check_batch
from workers.engine.parting import parted
from workers.engine.passes import Pass, cut
from workers.losses import Loss
from workers.losses.cross_entropy import cross_entropy
from workers.losses.dpo import dpo
from workers.operations import Batch, LossRequest

VOCABULARY, CONTEXT = 50, 64


def batch_of(lengths: list[int], loss: Loss = cross_entropy) -> ScoredBatch:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32) % VOCABULARY
    weights = np.ones(len(tokens), np.float32)
    request = LossRequest(Batch(offsets, tokens, (tokens + 1) % VOCABULARY, weights))
    return check_batch(request, loss, loss.card.reductions[0], VOCABULARY, CONTEXT)


def whole(batches: list[ScoredBatch]) -> Pass:
    (work,) = cut(batches, 100_000)
    return work


def documents(work: Pass) -> list[tuple[int, int, list[int], list[int], list[int]]]:
    """Each document: its call, row, tokens, positions and scored places in the call's batch."""
    found = []
    for share in work.shares:
        begin = share.tokens.start
        sources = np.split(share.sources, np.cumsum(share.counts)[:-1])
        for row, length, own in zip(
            share.rows, work.lengths[share.documents], sources, strict=True
        ):
            tokens = slice(begin, begin + length)
            begin += length
            assert set(work.rows[tokens]) == {row}
            found.append(
                (
                    share.call,
                    row,
                    work.ids[tokens].tolist(),
                    work.positions[tokens].tolist(),
                    own.tolist(),
                )
            )
    return found


@given(
    st.lists(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=8), min_size=1, max_size=8),
    st.integers(1, 16),
)
def test_every_document_is_in_one_part_and_none_is_lopsided(calls, most):
    work = whole([batch_of(lengths) for lengths in calls])
    batches = [batch_of(lengths) for lengths in calls]
    parts = parted(batches, work, most)
    assert 1 <= len(parts) <= most
    place = {document[:2]: at for at, document in enumerate(documents(work))}
    for part in parts:
        assert len(part.ids) * len(parts) <= 1.15 * len(work.ids)
        order = [place[document[:2]] for document in documents(part)]
        assert order == sorted(order)
    together = [document for part in parts for document in documents(part)]
    assert sorted(together) == sorted(documents(work))
    again = parted(batches, work, most)
    assert [documents(part) for part in again] == [documents(part) for part in parts]
    if len(parts) == 1:
        assert parts == [work]


@pytest.mark.parametrize(
    ("lengths", "most", "sizes"),
    [
        ([48, 64, 40, 56], 2, [104, 104]),
        ([64] * 8, 4, [128] * 4),
        ([64] * 6, 4, [128] * 3),  # four would wait for two of them
        ([64, 8, 8], 2, [80]),
        ([64], 4, [64]),
        ([64] * 7, 8, [64] * 7),  # eight would leave one empty
    ],
)
def test_as_many_parts_as_can_be_of_like_size(lengths, most, sizes):
    batch = batch_of(lengths)
    parts = parted([batch], whole([batch]), most)
    assert sorted(len(part.ids) for part in parts) == sorted(sizes)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(2, 4))
def test_rows_together_stay_together(pairs, most):
    batch = batch_of([length for length in pairs for _ in range(2)], dpo)
    for part in parted([batch], whole([batch]), most):
        (share,) = part.shares
        assert all(
            two == one + 1 for one, two in zip(share.rows[::2], share.rows[1::2], strict=True)
        )


def test_small_calls_are_not_parted():
    batches = [batch_of([6, 4]) for _ in range(8)]
    parts = parted(batches, whole(batches), 2)
    assert [len(part.shares) for part in parts] == [4, 4]
    assert all(share.rows == [0, 1] for part in parts for share in part.shares)
