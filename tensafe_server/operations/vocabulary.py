"""Token ids that a model knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, place_in_batch


def check_vocabulary(tokens: Array, field: str, model: Model, offsets: Array | None = None) -> None:
    """Names the first bad token by its place, in its datum where `offsets` tell the datums.

    Args:
        tokens: [N] or [N, K].

    Raises:
        TenSafeFault: TOKEN_OUT_OF_RANGE.
    """
    if not (model.vocabulary_size and tokens.size):
        return
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocabulary_size:
        first = tuple(np.argwhere((tokens < 0) | (tokens >= model.vocabulary_size))[0])
        bad = int(first[0])
        where = f"position {bad}"
        facts: dict[str, Any] = {"position": bad}
        if offsets is not None:
            datum, position = place_in_batch(offsets, bad)
            where = f"position {position} of datum {datum}"
            facts = {"datum": datum, "position": position}
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"token {int(tokens[first])} at {where} is outside the vocabulary of {model.name}, 0 "
            f"to {model.vocabulary_size - 1}; was another tokenizer used?",
            field=field,
            token_id=int(tokens[first]),
            vocabulary_size=model.vocabulary_size,
            **facts,
        )
