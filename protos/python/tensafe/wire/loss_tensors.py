"""Whether the tensors of a batch fit a loss: their types, shapes and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe.wire.losses import LossCard, Reduction
from tensafe.wire.status import TenSafeFault

Array = NDArray[Any]
Where = Callable[[str], str]
_DTYPES = {name: np.dtype(name) for name in ("int32", "float32")}


def check_tensors(
    card: LossCard,
    tensors: Mapping[str, Array],
    offsets: Array,
    reduction: Reduction,
    where: Where,
    *,
    may_score_nothing: bool = False,
) -> None:
    """Checks everything but token ids, which need the model's vocabulary.

    Args:
        tensors: by name; the names fit the card.
        offsets: int64 [B + 1] of the input tokens, checked.
        where: an input's name → the field that errors name.
        may_score_nothing: of private runs, where an error would tell of the rows.

    Raises:
        TenSafeFault: INVALID_BATCH or NOTHING_SCORED, naming the field.
    """
    _check_shapes(card, tensors, offsets.item(-1), where)
    weights = tensors.get("weights")
    if weights is not None:
        total = _check_weights(weights, reduction, where("weights"))
        if not (may_score_nothing or total or weights.any()):
            raise TenSafeFault(
                "NOTHING_SCORED",
                "every weight is 0, so that there is no loss (labels all -100?); score at least "
                "one token",
                field=where("weights"),
            )
    for name, values in tensors.items():
        if name != "weights" and values.dtype.kind == "f":
            _check_finite(values, weights, name, where(name))
    if card.datums_together > 1:
        _check_together(card, weights, offsets, where("weights"))


def is_scored(weights: Array) -> Array:
    """bool [N]: where a weight is not 0, of [N] or [N, K]."""
    scored: Array = weights != 0 if weights.ndim == 1 else (weights != 0).any(1)
    return scored


def _check_shapes(card: LossCard, tensors: Mapping[str, Array], total: int, where: Where) -> None:
    wide: tuple[str, tuple[int, ...]] | None = None
    for name, values in tensors.items():
        item = card.input(name)
        if item is None:
            raise ValueError(f"{card.name} takes no {name}")
        shape = values.shape
        fits = shape == (total,)
        if item.wide and values.ndim == 2:
            fits = shape[0] == total and shape[1] > 0
        if values.dtype != _DTYPES[item.dtype] or not fits:
            raise TenSafeFault(
                "INVALID_BATCH",
                f"{name} must be {item.dtype} [{total}]{f' or [{total}, K]' * item.wide}, one row "
                f"for each input token; it is {values.dtype.name} {list(shape)}",
                field=where(name),
            )
        if item.wide:
            if wide is not None and wide[1] != shape:
                raise TenSafeFault(
                    "INVALID_BATCH",
                    f"{name} is {list(shape)} and {wide[0]} {list(wide[1])}; give both one shape",
                    field=where(name),
                )
            wide = wide or (name, shape)
    if wide is not None and len(wide[1]) > 1 and "weights" not in tensors:
        raise TenSafeFault(
            "INVALID_BATCH",
            f"{wide[0]} has {wide[1][1]} values for each token, so weights must be given: which of "
            "them count, and how much",
            field=where("weights"),
        )


def _check_weights(weights: Array, reduction: Reduction, field: str) -> float:
    """Returns their sum."""
    total: float = np.add.reduce(weights, axis=None, dtype=np.float64).item()
    if not math.isfinite(total):
        raise TenSafeFault("INVALID_BATCH", "weights must be finite", field=field)
    if reduction is not Reduction.SUM and np.count_nonzero(weights < 0):
        raise TenSafeFault(
            "INVALID_BATCH",
            f"a weight is negative, which has no {reduction}; use the reduction `sum`",
            field=field,
        )
    return total


def _check_finite(values: Array, weights: Array | None, name: str, field: str) -> None:
    # What is not scored may hold any filler, NaN too.
    if weights is not None:
        mask = weights != 0 if weights.shape == values.shape else is_scored(weights)
        values = values[mask]
    if not np.isfinite(values).all():
        raise TenSafeFault(
            "INVALID_BATCH",
            f"{name} is NaN or infinite at a scored token; it must be finite there",
            field=field,
        )


def _check_together(card: LossCard, weights: Array | None, offsets: Array, field: str) -> None:
    count = len(offsets) - 1
    if count % card.datums_together:
        raise TenSafeFault(
            "INVALID_BATCH",
            f"{card.name} takes datums {card.datums_together} by {card.datums_together}, and the "
            f"batch has {count}; add or remove one",
            field=field,
        )
    if weights is None:
        return
    scored = np.logical_or.reduceat(is_scored(weights), offsets[:-1])
    if not scored.all():
        datum = int(np.flatnonzero(~scored)[0])
        raise TenSafeFault(
            "INVALID_BATCH",
            f"datum {datum} has no scored token, and {card.name} needs one in each; score its "
            "completion",
            field=field,
            datum=datum,
        )
