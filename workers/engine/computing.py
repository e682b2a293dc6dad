"""Computes a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from workers.engine.base_model import BaseModel
from workers.engine.dividing import dividing
from workers.engine.dropout import last_dropped, operation_key, pass_dropout
from workers.engine.graphs.captured import PLAIN_ROWS, Member
from workers.engine.lora import PassAdapters, Segment
from workers.engine.packing import pack
from workers.engine.passes import Call, Pass, Share
from workers.engine.privacy.gradients import UnitGradients
from workers.engine.products import SegmentLoop
from workers.engine.scoring import Portion, PortionLoss, backward, score
from workers.engine.uploads import upload
from workers.operations import Int64


def compute(
    model: BaseModel,
    calls: Sequence[Call],
    work: Pass,
    *,
    trains: bool,
    drops: bool = True,
    frugal: bool = False,
    exact: bool = False,
    asides: Mapping[int, Tensor] | None = None,
) -> list[PortionLoss]:
    """Runs one pass; if it trains, adds to the calls' gradients.

    Args:
        drops: whether dropout acts.
        frugal: keep no activations inside the model's layers, and make them anew for the backward
            pass.
        exact: the same kernels on the same shapes each time, whatever is ready by now.
        asides: by call, where its gradient is added instead, if other passes add to the call's
            meanwhile.

    Returns:
        What came of each share of the pass, without graph.

    Raises:
        LossFunctionError: a loss function failed.
    """
    device = model.device
    units = [_units(calls[share.call], share, work) for share in work.shares]
    # Kept apart by the loop alone.
    apart = any(own is not None for own in units)
    host = _numbers(calls, work, drops)
    places = upload(work.scored, device)
    with torch.set_grad_enabled(trains), model.dividing(len(work.ids)):
        captured = None
        members = [Member(calls[share.call].adapter, share.tokens.stop) for share in work.shares]
        if model.graphs is not None and not apart and (exact or not frugal):
            captured = model.graphs.load(
                host, work.lengths, members, trains=trains, exact=exact, frugal=frugal
            )
        # Few transfers, whatever the number of calls.
        numbers = upload(host, device) if captured is None else captured.numbers(len(work.ids))
        portions = [
            _portion(calls[share.call], share, reference)
            for share, reference in zip(
                work.shares, _references(model, calls, work, numbers, places), strict=True
            )
        ]
        adapters = None
        if captured is None:
            adapters = _adapters(model, calls, work, numbers, units, trains, frugal, asides or {})
        with model.carrying(adapters):
            if captured is not None:
                hidden = captured.scored(places, members)
            else:
                packing = pack(work.lengths, device)
                whole = model.hidden(numbers[0], numbers[1], packing, frugal=frugal)
                hidden = whole.index_select(0, places)
            with dividing(len(places) * model.vocabulary_size, device):
                found = score(model.head, hidden, portions)
            if trains:
                backward(found)
    return [
        _clipped(calls[share.call], own, each.detached())
        for share, own, each in zip(work.shares, units, found, strict=True)
    ]


def _numbers(calls: Sequence[Call], work: Pass, drops: bool) -> Int64:
    """[2, N] ids and positions; if any call drops, [5, N] with what `pass_dropout` takes."""
    plain = [work.ids, work.positions]
    settings = [calls[share.call].adapter.settings for share in work.shares]
    if not (drops and any(lora.dropout for lora in settings)):
        return np.stack(plain)
    keys, last = np.empty_like(work.ids), np.empty_like(work.ids)
    for share, lora in zip(work.shares, settings, strict=True):
        call = calls[share.call]
        keys[share.tokens] = operation_key(call.seed, call.operation)
        last[share.tokens] = last_dropped(lora.dropout)
    return np.stack([*plain, work.rows, keys, last])


def _adapters(
    model: BaseModel,
    calls: Sequence[Call],
    work: Pass,
    numbers: Tensor,
    units: Sequence[UnitGradients | None],
    trains: bool,
    frugal: bool,
    asides: Mapping[int, Tensor],
) -> PassAdapters:
    apart = any(own is not None for own in units)
    dropout = None
    if len(numbers) > PLAIN_ROWS:
        dropout = pass_dropout(numbers[1:], twice=trains and not frugal)
    return PassAdapters(
        [
            Segment(
                share.tokens.start,
                share.tokens.stop,
                adapter := calls[share.call].adapter,
                own,
                adapter.pairs(asides[share.call]) if share.call in asides else None,
            )
            for share, own in zip(work.shares, units, strict=True)
        ],
        # A unit's gradient is of one type whatever lies beside it, and however much.
        model.dtype if apart else _adapter_dtype(model, calls, work, trains),
        SegmentLoop() if apart or len(work.shares) == 1 else model.product,
        dropout,
        trains=trains,
    )


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
    ids, positions = torch.cat([numbers[:PLAIN_ROWS, share.tokens] for share in own], 1)
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
