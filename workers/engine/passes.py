"""Cuts the batches of one or several calls into passes, and computes a pass.

A pass is documents laid end to end, without padding, each call's together. The result does not
depend on the cut but for float rounding: the loss is a sum over positions, or over rows that are
never separated, and a causal model's position sees nothing to its right, so a row's tail after its
last scored position is dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.attention import pack
from workers.engine.base_model import BaseModel
from workers.engine.batches import ScoredBatch
from workers.engine.dropout import PassDropout, last_dropped, token_keys
from workers.engine.kernels import fused
from workers.engine.lora import PassAdapters, Segment
from workers.engine.objectives import Objective
from workers.engine.privacy.calls import PrivateCall
from workers.engine.privacy.gradients import UnitGradients
from workers.engine.products import SegmentLoop
from workers.engine.scoring import Portion, PortionLoss, score
from workers.operations import Int64


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
    passes: list[list[tuple[int, int]]] = []
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
    return [_pass(batches, members) for members in passes]


def _in_order(batch: ScoredBatch, lengths: Int64) -> list[int]:
    """Groups of rows that are never separated, by the length of each."""
    order = np.argsort(-lengths, kind="stable")
    if batch.units is not None:
        longest = np.zeros(batch.units.max() + 1, np.int64)
        np.maximum.at(longest, batch.units, lengths)
        order = np.lexsort((-lengths, batch.units, -longest[batch.units]))
    return [int(group) for group in order]


def _pass(batches: Sequence[ScoredBatch], members: list[tuple[int, int]]) -> Pass:
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


def compute(
    model: BaseModel,
    calls: Sequence[Call],
    work: Pass,
    *,
    trains: bool,
    drops: bool = True,
    frugal: bool = False,
    exact: bool = False,
) -> list[PortionLoss]:
    """Runs one pass; if it trains, adds to the calls' gradients.

    Args:
        drops: whether dropout acts.
        frugal: keep no activations inside the model's layers, and make them anew for the backward
            pass.
        exact: use no compiled kernels, which come when they are ready.

    Returns:
        What came of each share of the pass, without graph.

    Raises:
        LossFunctionError: a loss function failed.
    """
    device = model.device
    # Few transfers, whatever the number of calls.
    numbers = torch.from_numpy(np.stack([work.ids, work.positions, work.rows])).to(device)
    places = torch.from_numpy(work.scored).to(device)
    references = _references(model, calls, work, numbers, places)
    units = [_units(calls[share.call], share, work) for share in work.shares]
    # Kept apart by the loop alone.
    apart = any(own is not None for own in units)
    packing = pack(work.lengths, device, apart=apart)
    adapters = PassAdapters(
        [
            Segment(share.tokens.start, share.tokens.stop, calls[share.call].adapter, own)
            for share, own in zip(work.shares, units, strict=True)
        ],
        # A unit's gradient is of one type whatever lies beside it, and however much.
        model.dtype if apart else _adapter_dtype(model, calls, work, trains),
        SegmentLoop() if apart or len(work.shares) == 1 else model.product,
        _dropout(calls, work, numbers) if drops else None,
        trains=trains,
    )
    # Nor does how it is computed depend on how much lies beside it.
    kernels = fused(sys.maxsize if apart else len(work.ids), exact=exact)
    with torch.set_grad_enabled(trains), model.carrying(adapters), kernels:
        hidden = model.hidden(numbers[0], numbers[1], packing, frugal=frugal)
        portions = [
            _portion(calls[share.call], share, reference)
            for share, reference in zip(work.shares, references, strict=True)
        ]
        found = score(model.head, hidden.index_select(0, places), portions)
        if trains:
            torch.stack([each.loss for each in found]).sum().backward()  # type: ignore[no-untyped-call]
    return [
        _clipped(calls[share.call], own, each.detached())
        for share, own, each in zip(work.shares, units, found, strict=True)
    ]


def _adapter_dtype(
    model: BaseModel, calls: Sequence[Call], work: Pass, trains: bool
) -> torch.dtype:
    """The sampler's if anybody compares the pass's log-probabilities with its; else the fastest."""
    if not trains or any(calls[s.call].objective.measures_against_others for s in work.shares):
        return model.faithful_adapter_dtype
    return model.adapter_dtype(min(s.tokens.stop - s.tokens.start for s in work.shares))


def _units(call: Call, share: Share, work: Pass) -> UnitGradients | None:
    if call.private is None:
        return None
    return call.private.gradients(share.rows, work.lengths[share.documents])


def _clipped(call: Call, units: UnitGradients | None, found: PortionLoss) -> PortionLoss:
    """Adds the clipped gradients of a private call's units to its adapter's."""
    if call.private is None or units is None or found.row_losses is None:
        return found
    return replace(found, loss=call.private.close(units, found.row_losses))


def _portion(call: Call, share: Share, reference: Tensor | None) -> Portion:
    return Portion(
        call=share.call,
        objective=call.objective,
        batch=call.batch,
        rows=share.rows,
        sources=share.sources,
        counts=share.counts,
        places=share.scored,
        reference_SD=reference,
        apart=call.private is not None,
    )


@torch.no_grad()
def _references(
    model: BaseModel, calls: Sequence[Call], work: Pass, numbers: Tensor, places: Tensor
) -> list[Tensor | None]:
    """Hidden states of what each share compares with, at its scored positions; None if it does
    not. Without dropout, by the documents of those shares alone."""
    found: list[Tensor | None] = [None] * len(work.shares)
    compared = [i for i, share in enumerate(work.shares) if calls[share.call].objective.compares]
    if not compared:
        return found
    own = [work.shares[index] for index in compared]
    lengths = [length for share in own for length in work.lengths[share.documents]]
    ids, positions, _ = torch.cat([numbers[:, share.tokens] for share in own], 1)
    begins = np.cumsum([0, *(share.tokens.stop - share.tokens.start for share in own)]).tolist()
    segments = [
        Segment(begin, end, adapter)
        for share, begin, end in zip(own, begins[:-1], begins[1:], strict=True)
        if (adapter := calls[share.call].objective.reference) is not None
    ]
    adapters = None
    if segments:
        adapters = PassAdapters(segments, model.faithful_adapter_dtype, SegmentLoop())
    with model.carrying(adapters):
        hidden = model.hidden(ids, positions, pack(lengths, model.device))
    for index, share, begin in zip(compared, own, begins[:-1], strict=True):
        shifted = places[share.scored] - share.tokens.start + begin
        found[index] = hidden.index_select(0, shifted)
    return found


def _dropout(calls: Sequence[Call], work: Pass, numbers: Tensor) -> PassDropout | None:
    settings = [calls[share.call].adapter.settings for share in work.shares]
    if not any(lora.dropout for lora in settings):
        return None
    positions, rows = numbers[1:].to(torch.int32)
    keys, last = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.int16)
    for share, lora in zip(work.shares, settings, strict=True):
        call, tokens = calls[share.call], share.tokens
        keys[tokens] = token_keys(call.seed, call.operation, rows[tokens], positions[tokens])
        last[tokens] = last_dropped(lora.dropout)
    return PassDropout(keys, last[:, None])
