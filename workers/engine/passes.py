"""Cuts the batches of one or several calls into passes, and computes a pass.

A pass is documents laid end to end, without padding, each call's together. The result does not
depend on the cut but for float rounding: the loss is a sum over positions, and a causal model's
position sees nothing to its right, so a row's tail after its last scored position is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.attention import pack
from workers.engine.base_model import BaseModel
from workers.engine.batches import ScoredBatch
from workers.engine.dropout import PassDropout, last_dropped, token_keys
from workers.engine.lora import PassAdapters, Segment
from workers.engine.losses import target_logprobs
from workers.engine.products import SegmentLoop
from workers.operations import Int64


@dataclass(frozen=True, slots=True)
class Call:
    """One forward or forward_backward.

    Attributes:
        seed, operation: what its dropout masks come from.
    """

    adapter: Adapter
    batch: ScoredBatch
    seed: int = 0
    operation: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What a pass computes for one call.

    Attributes:
        call: its index.
        rows: of its batch, in the order of the pass.
        tokens: where they lie in the pass.
        scored: where their scored positions lie among the pass's.
        sources: int64 [s], where those lie in the call's batch.
    """

    call: int
    rows: list[int]
    tokens: slice
    scored: slice
    sources: Int64


@dataclass(frozen=True, slots=True)
class Pass:
    """Documents end to end.

    Attributes:
        ids, positions: int64 [N].
        rows: int32 [N], each token's datum in its batch.
        lengths: tokens of each document.
        scored: int64 [S], places of the scored positions in [N].
        targets: int64 [S].
        weights: float32 [S].
    """

    shares: list[Share]
    ids: Int64
    positions: Int64
    rows: Int64
    lengths: list[int]
    scored: Int64
    targets: Int64
    weights: np.ndarray[tuple[int], np.dtype[np.float32]]


def cut(batches: Sequence[ScoredBatch], token_budget: int) -> list[Pass]:
    """Cuts calls into passes of at most `token_budget` tokens, or of one row.

    Rows without a scored position are left out. Calls and, in them, rows go by length, so that
    neighbours are alike; ties keep their order.
    """
    order = sorted(range(len(batches)), key=lambda call: -int(batches[call].ends.max()))
    passes: list[list[tuple[int, int]]] = []
    filled = 0
    for call in order:
        ends = batches[call].ends
        for row in np.argsort(-ends, kind="stable").tolist():
            length = int(ends[row])
            if length == 0:
                break
            if not passes or filled + length > token_budget:
                passes.append([])
                filled = 0
            passes[-1].append((call, row))
            filled += length
    return [_pass(batches, members) for members in passes]


def _pass(batches: Sequence[ScoredBatch], members: list[tuple[int, int]]) -> Pass:
    ids, positions, rows, lengths = [], [], [], []
    scored, targets, weights = [], [], []
    shares: list[Share] = []
    tokens = places = 0
    for call in dict.fromkeys(call for call, _ in members):
        batch = batches[call]
        own = [row for owner, row in members if owner == call]
        first_token, first_place = tokens, places
        sources = []
        for row in own:
            begin, length = int(batch.offsets[row]), int(batch.ends[row])
            ids.append(batch.tokens[begin : begin + length])
            positions.append(np.arange(length))
            rows.append(np.full(length, row))
            lengths.append(length)
            found = np.flatnonzero(batch.weights[begin : begin + length])
            scored.append(found + tokens)
            sources.append(found + begin)
            tokens += length
            places += len(found)
        source = np.concatenate(sources)
        targets.append(batch.targets[source])
        weights.append(batch.weights[source])
        shares.append(
            Share(call, own, slice(first_token, tokens), slice(first_place, places), source)
        )
    return Pass(
        shares=shares,
        ids=np.concatenate(ids).astype(np.int64),
        positions=np.concatenate(positions),
        rows=np.concatenate(rows),
        lengths=lengths,
        scored=np.concatenate(scored),
        targets=np.concatenate(targets).astype(np.int64),
        weights=np.concatenate(weights),
    )


def compute(
    model: BaseModel, calls: Sequence[Call], work: Pass, *, trains: bool, frugal: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs one pass; if it trains, adds to the calls' gradients.

    Args:
        frugal: keep no activations inside the model's layers, and make them anew for the backward
            pass.

    Returns:
        Log-probabilities [S] of the targets, and the loss [C] of each share of the pass; both
        float32, or the model's wider type, without graph.
    """
    device = model.device
    # Few transfers, whatever the number of calls.
    numbers = torch.from_numpy(np.stack([work.ids, work.positions, work.rows])).to(device)
    places = torch.from_numpy(np.stack([work.scored, work.targets])).to(device)
    weights = torch.from_numpy(work.weights).to(device)
    packing = pack(work.lengths, device)
    adapters = PassAdapters(
        [Segment(s.tokens.start, s.tokens.stop, calls[s.call].adapter) for s in work.shares],
        model.adapter_dtype,
        model.product if len(work.shares) > 1 else SegmentLoop(),
        _dropout(calls, work, numbers) if trains else None,
        trains=trains,
    )
    with torch.set_grad_enabled(trains), model.carrying(adapters):
        hidden = model.hidden(numbers[0], numbers[1], packing, frugal=frugal)
        logprobs = target_logprobs(
            hidden.index_select(0, places[0]), model.head.weight, model.head.bias, places[1]
        )
        terms = -weights * logprobs
        losses = torch.stack([terms[share.scored].sum() for share in work.shares])
        if trains:
            losses.sum().backward()  # type: ignore[no-untyped-call]
    return logprobs.detach(), losses.detach()


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
