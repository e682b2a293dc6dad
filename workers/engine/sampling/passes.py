"""What goes through the model: prompts as documents laid end to end, then a token of each row."""

# ruff: noqa: N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.base_model import BaseModel
from workers.engine.head import target_logprobs
from workers.engine.lora import PassAdapters, Segment
from workers.engine.packing import pack
from workers.engine.products import SegmentLoop
from workers.engine.sampling.cache import Place
from workers.engine.sampling.decoding import Decoding
from workers.engine.sampling.distribution import Workspace
from workers.engine.sampling.row_adapters import RowAdapters
from workers.engine.sampling.weights import PinnedWeights
from workers.operations import Float32, Int32


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens to compute, and where their keys and values go.

    Attributes:
        wants_logprobs: of its tokens.
    """

    tokens: Int32
    place: Place[Any]
    weights: PinnedWeights
    wants_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What came of a document: [D] of its last token; float32 [P] of its tokens if wanted, NaN for
    the first."""

    hidden: Tensor
    logprobs: Float32 | None


@torch.no_grad()
def prefill(model: BaseModel, documents: Sequence[Document]) -> list[Prefilled]:
    """Computes documents in one pass."""
    weights = list(dict.fromkeys(document.weights for document in documents))
    order = sorted(
        range(len(documents)),
        key=lambda i: (weights.index(documents[i].weights), -len(documents[i].tokens)),
    )
    ordered = [documents[i] for i in order]
    lengths = [len(document.tokens) for document in ordered]
    ends = np.cumsum(lengths).tolist()
    spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    ids = np.concatenate([document.tokens for document in ordered]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    numbers = torch.from_numpy(np.stack([ids, positions])).to(model.device)
    layout = pack(lengths, model.device)

    def keep(layer: int, k_NGE: Tensor, v_NGE: Tensor) -> None:  # noqa: N803
        for document, span in zip(ordered, spans, strict=True):
            document.place.write(layer, k_NGE[span], v_NGE[span])

    layout.keep = keep
    with model.carrying(_segments(model, ordered, spans)), model.dividing(len(ids)):
        hidden_ND = model.hidden(numbers[0], numbers[1], layout)
    for document, length in zip(ordered, lengths, strict=True):
        document.place.length = length
    found = {
        i: Prefilled(
            hidden_ND[span.stop - 1].clone(),
            _logprobs(model, hidden_ND[span], numbers[0][span])
            if documents[i].wants_logprobs
            else None,
        )
        for i, span in zip(order, spans, strict=True)
    }
    return [found[i] for i in range(len(documents))]


def _segments(
    model: BaseModel, documents: Sequence[Document], spans: Sequence[slice]
) -> PassAdapters | None:
    segments: list[Segment] = []
    for document, span in zip(documents, spans, strict=True):
        adapter = document.weights.adapter
        if adapter is None:
            continue
        if segments and segments[-1].adapter is adapter:
            segments[-1] = Segment(segments[-1].begin, span.stop, adapter)
        else:
            segments.append(Segment(span.start, span.stop, adapter))
    if not segments:
        return None
    product = model.product if len(segments) > 1 else SegmentLoop()
    return PassAdapters(segments, model.faithful_adapter_dtype, product)


def _logprobs(model: BaseModel, hidden_PD: Tensor, tokens_P: Tensor) -> Float32:  # noqa: N803
    found = np.full(len(tokens_P), np.nan, np.float32)
    if len(tokens_P) > 1:
        head = model.head
        own = target_logprobs(hidden_PD[:-1].contiguous(), head.weight, head.bias, tokens_P[1:])
        found[1:] = own.float().cpu().numpy()
    return found


@torch.no_grad()
def decode(
    model: BaseModel,
    tokens: Sequence[int],
    places: Sequence[Place[Any] | None],
    adapters: RowAdapters | None,
    *,
    alone: bool = False,
) -> Tensor:
    """Hidden states [N, D] of one more token of each row; its keys and values are kept.

    Args:
        places: in the order that `Decoding` wants; None for a token that belongs to no row.
        alone: no number may depend on another row.
    """
    positions = [0 if place is None else place.length for place in places]
    numbers = torch.tensor([list(tokens), positions], device=model.device)
    layout = Decoding(places, model.device, alone=alone)
    with model.carrying(adapters), model.dividing(len(tokens)):
        hidden_ND = model.hidden(numbers[0], numbers[1], layout)
    for place in places:
        if place is not None:
            place.length += 1
    return hidden_ND


@torch.no_grad()
def logits_of(model: BaseModel, hidden_ND: Tensor, workspace: Workspace) -> Tensor:  # noqa: N803
    """[N, V] in float32, or the model's wider type, in the workspace."""
    shape = len(hidden_ND), model.vocabulary_size
    own = workspace.take("head", *shape, model.dtype, model.device)
    torch.mm(hidden_ND, model.head.weight.t(), out=own)
    if model.head.bias is not None:
        own += model.head.bias
    wide = torch.promote_types(model.dtype, torch.float32)
    if wide == model.dtype:
        return own
    return workspace.take("logits", *shape, wide, model.device).copy_(own)
