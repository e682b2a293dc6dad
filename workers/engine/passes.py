"""Cuts the batches of one or several calls into passes.

A pass is documents laid end to end, without padding, each call's together. The result does not
depend on the cut but for float rounding: the loss is a sum over positions, or over rows that are
never separated, and a causal model's position sees nothing to its right, so a row's tail after its
last scored position is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.engine.adapters import Adapter
from workers.engine.batches import ScoredBatch
from workers.engine.objectives import Objective
from workers.engine.privacy.calls import PrivateCall
from workers.operations import Int64

Member = tuple[int, int]
"""The index of a call, and a row of its batch."""


@dataclass(frozen=True, slots=True)
class Call:
    """One forward or forward_backward.

    Attributes:
        objective: what is computed of the batch.
        seed, operation: what its dropout masks come from.
        private: what keeps its units' gradients apart; None for one sum.
    """

    adapter: Adapter
    batch: ScoredBatch
    objective: Objective
    seed: int = 0
    operation: int = 0
    private: PrivateCall | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What a pass computes for one call.

    Attributes:
        call: its index.
        rows: of its batch, in the order of the pass.
        documents: which of the pass's they are.
        tokens: where they lie in the pass.
        scored: where their scored positions lie among the pass's.
        sources: int64 [s], where those lie in the call's batch.
        counts: scored positions of each row.
    """

    call: int
    rows: list[int]
    documents: slice
    tokens: slice
    scored: slice
    sources: Int64
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Pass:
    """Documents end to end.

    Attributes:
        ids, positions: int64 [N].
        rows: int64 [N] in int32's range, what tells the masks of each token's row apart.
        lengths: tokens of each document.
        scored: int64 [S], places of the scored positions in [N].
        is_one_unit: whether it cannot be cut further: one row, or rows together.
    """

    shares: list[Share]
    ids: Int64
    positions: Int64
    rows: Int64
    lengths: list[int]
    scored: Int64
    is_one_unit: bool


def cut(batches: Sequence[ScoredBatch], token_budget: int) -> list[Pass]:
    """Cuts calls into passes of at most `token_budget` tokens, or of one row (or rows together).

    Rows without a scored position are left out. Calls and, in them, rows go by length, so that
    neighbours are alike; ties keep their order. Rows of one privacy unit go behind its longest.
    """
    lengths = [batch.ends.reshape(-1, batch.together).sum(1) for batch in batches]
    order = sorted(range(len(batches)), key=lambda call: -int(lengths[call].max()))
    passes: list[list[Member]] = []
    filled = 0
    for call in order:
        batch, together = batches[call], batches[call].together
        for group in _in_order(batch, lengths[call]):
            length = int(lengths[call][group])
            if length == 0:
                continue
            taken = max(length, batch.least_tokens)
            if not passes or filled + taken > token_budget:
                passes.append([])
                filled = 0
            passes[-1] += [(call, group * together + row) for row in range(together)]
            filled += taken
    return [lay_out(batches, members) for members in passes]


def _in_order(batch: ScoredBatch, lengths: Int64) -> list[int]:
    """Groups of rows that are never separated, by the length of each."""
    order = np.argsort(-lengths, kind="stable")
    if batch.units is not None:
        longest = np.zeros(batch.units.max() + 1, np.int64)
        np.maximum.at(longest, batch.units, lengths)
        order = np.lexsort((-lengths, batch.units, -longest[batch.units]))
    return [int(group) for group in order]


def lay_out(batches: Sequence[ScoredBatch], members: Sequence[Member]) -> Pass:
    """The pass of these rows, in their order, but each call's together."""
    ids, positions, rows, scored = [], [], [], []
    lengths: list[int] = []
    shares: list[Share] = []
    tokens = places = 0
    for call in dict.fromkeys(call for call, _ in members):
        batch = batches[call]
        own = [row for owner, row in members if owner == call]
        first_document, first_token, first_place = len(lengths), tokens, places
        sources: list[Int64] = []
        for row in own:
            begin, length = int(batch.offsets[row]), int(batch.ends[row])
            ids.append(batch.tokens[begin : begin + length])
            positions.append(np.arange(length))
            rows.append(np.full(length, batch.row_keys[row]))
            lengths.append(length)
            first, last = np.searchsorted(batch.places, (begin, begin + length))
            found = batch.places[first:last]
            scored.append(found - begin + tokens)
            sources.append(found)
            tokens += length
            places += len(found)
        shares.append(
            Share(
                call=call,
                rows=own,
                documents=slice(first_document, len(lengths)),
                tokens=slice(first_token, tokens),
                scored=slice(first_place, places),
                sources=np.concatenate(sources),
                counts=[len(found) for found in sources],
            )
        )
    return Pass(
        shares=shares,
        ids=np.concatenate(ids).astype(np.int64),
        positions=np.concatenate(positions),
        rows=np.concatenate(rows),
        lengths=lengths,
        scored=np.concatenate(scored),
        is_one_unit=len(members) == batches[members[0][0]].together,
    )
