"""Batches: from what a Hugging Face data loader yields, or from datums, to the wire's Batch.

A Hugging Face batch has labels aligned with its inputs. The service never shifts, so it is done
here: row b of `input_ids` [T] becomes inputs `ids[:-1]`, targets `labels[1:]` and weights
`labels[1:] != -100`, after the padding that `attention_mask` marks has been dropped. That is the
loss of `transformers` where padding has the label −100, as its collators give it. Padding is never
scored here, whatever its label, and neither is a token that follows padding on its left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import types_pb2
from tensafe.wire.tensors import Array
from tensafe_client.data.datum import IGNORE_INDEX, Datum, check_tokens, to_numpy, unit_id_of
from tensafe_client.errors import BatchError

# Columns that tokenizers add and that change nothing in a causal language model's loss.
_NEUTRAL = frozenset({"token_type_ids", "special_tokens_mask", "length"})
_INT32, _INT64, _FLOAT32 = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<f4")
_READ = ("input_ids", "attention_mask", "labels", "unit_id")


class EncodedBatch(NamedTuple):
    """A batch ready to send.

    Attributes:
        message: the wire's form.
        offsets: int64 [B + 1]: datum b is rows offsets[b] to offsets[b + 1].
    """

    message: pb.Batch
    offsets: Array


def encode_batch(batch: Any) -> EncodedBatch:
    """Encodes a Hugging Face batch, or a list of `Datum`.

    Args:
        batch: a mapping with `input_ids` [B, T], `labels` [B, T] and, where rows are padded,
            `attention_mask` [B, T], each as nested lists, NumPy or torch, and, for private runs,
            maybe `unit_id`, B texts; or a sequence of `Datum`.

    Raises:
        BatchError: naming row and field, if the batch is empty, ragged or malformed, or nothing in
            it is scored.
    """
    return _encode(batch, private=False)


def encode_private_batch(batch: Any) -> EncodedBatch:
    """The same for a private run, where a batch may be empty, as one that was drawn may be, and one
    in which nothing is scored counts as that: an error would tell of its rows."""
    return _encode(batch, private=True)


def _encode(batch: Any, *, private: bool) -> EncodedBatch:
    if isinstance(batch, EncodedBatch):
        return batch
    if isinstance(batch, Mapping):
        return _encode_mapping(batch, may_score_nothing=private)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _encode_datums(batch) if batch or not private else _empty()
    raise BatchError.of(
        "batch",
        "must be a mapping with input_ids and labels, as a Hugging Face data loader yields, or "
        f"a list of Datum; got {type(batch).__name__}",
    )


def _empty() -> EncodedBatch:
    none = np.zeros(0, np.int64)
    return _pack(np.zeros(1, np.int64), none, none, none)


def _encode_datums(datums: Sequence[Any]) -> EncodedBatch:
    if not datums:
        raise BatchError.of("batch", "is empty: it needs at least one Datum")
    for row, datum in enumerate(datums):
        if not isinstance(datum, Datum):
            raise BatchError.of(
                f"batch[{row}]",
                f"is a {type(datum).__name__}, not a Datum",
                remedy="collate dicts into one mapping of padded arrays, or make a Datum of each",
            )
    ends = accumulate((len(datum) for datum in datums), initial=0)
    offsets = np.fromiter(ends, np.int64, len(datums) + 1)
    _check_alike(datums)
    unit_ids = [datum.unit_id for datum in datums if datum.unit_id is not None]
    if unit_ids and len(unit_ids) != len(datums):
        row = next(row for row, datum in enumerate(datums) if datum.unit_id is None)
        raise BatchError.of(
            f"[{row}].unit_id", "is missing, which others have; say of every datum whose it is"
        )
    # What is scored is left to the server here: negative weights, and weights that add up to 0,
    # have a meaning under the `sum` reduction.
    return _pack(
        offsets,
        np.concatenate([datum.tokens for datum in datums]),
        np.concatenate([datum.target_tokens for datum in datums]),
        np.concatenate([datum.weights for datum in datums]),
        {
            name: np.concatenate([datum.inputs[name] for datum in datums])
            for name in datums[0].inputs
        },
        unit_ids=unit_ids,
    )


def _check_alike(datums: Sequence[Datum]) -> None:
    """Raises BatchError naming the first datum whose tensors differ in kind from the first's."""
    first = datums[0]
    for row, datum in enumerate(datums):
        if datum.inputs.keys() != first.inputs.keys():
            name = min(datum.inputs.keys() ^ first.inputs.keys())
            other = row if name in first.inputs else 0
            raise BatchError.of(
                f"[{other}].{name}",
                f"is missing, which datum {0 if other else row} has; give every datum of a batch "
                "the same inputs",
            )
        for name in ("target_tokens", *datum.inputs):
            ours, theirs = _tensor(datum, name), _tensor(first, name)
            if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
                raise BatchError.of(
                    f"[{row}].{name}",
                    f"is {ours.dtype} {list(ours.shape)}, and that of datum 0 {theirs.dtype} "
                    f"{list(theirs.shape)}; give all datums of a batch the same kind",
                )


def _tensor(datum: Datum, name: str) -> Array:
    return datum.target_tokens if name == "target_tokens" else datum.inputs[name]


def _encode_mapping(batch: Mapping[str, Any], *, may_score_nothing: bool) -> EncodedBatch:
    _check_columns(batch)
    ids = _matrix("input_ids", batch["input_ids"])
    labels = _matrix("labels", batch["labels"])
    _same_shape("labels", labels, ids)
    check_tokens("input_ids", ids)
    scored = labels != IGNORE_INDEX
    check_tokens("labels", np.where(scored, labels, 0))
    rows, width = ids.shape
    mask = batch.get("attention_mask")
    if width < 2:
        raise BatchError.of(
            "input_ids", "needs two tokens in each row: one to read, one to predict"
        )
    if mask is None:
        keep = None
    else:
        keep, pairs_per_row = _kept_pairs(_matrix("attention_mask", mask), ids)
    weights = scored[:, 1:]
    targets = np.where(weights, labels[:, 1:], ids[:, 1:])
    inputs = ids[:, :-1]
    if keep is None:
        offsets = np.arange(0, rows * (width - 1) + 1, width - 1)
    else:
        inputs, targets, weights = inputs[keep], targets[keep], weights[keep]
        offsets = np.zeros(rows + 1, np.int64)
        np.cumsum(pairs_per_row, out=offsets[1:])
    if not may_score_nothing and not weights.any():
        raise BatchError(
            "nothing is scored: every label that follows another token is -100",
            reason="NOTHING_SCORED",
            violations=[("labels", "all -100")],
            remedy="set labels to the input ids where the model shall learn",
        )
    unit_ids = _unit_ids(batch.get("unit_id"), rows)
    return _pack(offsets, inputs.ravel(), targets.ravel(), weights.ravel(), unit_ids=unit_ids)


def _unit_ids(values: Any, rows: int) -> list[str]:
    if values is None:
        return []
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != rows:
        raise BatchError.of("unit_id", f"must be {rows} texts, one for each row")
    return [unit_id_of(f"unit_id[{row}]", value) for row, value in enumerate(values)]


def _check_columns(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", "labels"):
        if batch.get(name) is None:
            hint = "; for plain language modelling use a copy of input_ids" * (name == "labels")
            raise BatchError(f"the batch has no {name!r}{hint}", violations=[(name, "missing")])
    for name in batch:
        if name not in _READ and name not in _NEUTRAL:
            raise BatchError(
                f"the batch has a column {name!r} that would have no effect; remove it (read: "
                f"{', '.join(_READ)})",
                violations=[(str(name), "not supported")],
            )


def _matrix(field: str, values: Any) -> Array:
    """Converts to int64 [B, T], naming the row that does not fit."""
    if not hasattr(values, "shape"):
        values = _stack_rows(field, values)
    array = to_numpy(field, values)
    if array.ndim != 2:
        raise BatchError(
            f"{field} must have two dimensions, rows and tokens, got shape {list(array.shape)}",
            violations=[(field, "must be [B, T]")],
        )
    if array.shape[0] == 0:
        raise BatchError("the batch is empty: it has no rows", violations=[(field, "empty")])
    if array.dtype.kind == "b" and field == "attention_mask":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" and array.size:
        raise BatchError(
            f"{field} must be integers, got {array.dtype}", violations=[(field, "not integers")]
        )
    return array.astype(np.int64, copy=False)


def _stack_rows(field: str, values: Any) -> Any:
    """Checks that a list of rows is even; the rows may be lists, arrays or tensors."""
    try:
        lengths = [len(row) for row in values]
    except TypeError:
        raise BatchError(
            f"{field} must be a list of rows of token ids", violations=[(field, "must be [B, T]")]
        ) from None
    for row, length in enumerate(lengths):
        if length != lengths[0]:
            raise BatchError(
                f"row {row} of {field} has {length} tokens, row 0 has {lengths[0]}: pad the rows "
                "and mark the padding in attention_mask, or pass a list of Datum",
                violations=[(f"{field}[{row}]", "ragged")],
            )
    return [to_numpy(field, row) if hasattr(row, "detach") else row for row in values]


def _same_shape(field: str, array: Array, ids: Array) -> None:
    if array.shape != ids.shape:
        raise BatchError(
            f"{field} has shape {list(array.shape)}, input_ids {list(ids.shape)}",
            violations=[(field, "must have the shape of input_ids")],
        )


def _kept_pairs(mask: Array, ids: Array) -> tuple[Array | None, Array]:
    """Finds the pairs (t, t + 1) of two real tokens.

    Returns:
        bool [B, T − 1], or None if nothing is padded; and int64 [B]: such pairs of each row.
    """
    _same_shape("attention_mask", mask, ids)
    real = mask == 1
    if not (real | (mask == 0)).all():
        raise BatchError(
            "attention_mask may only have 0 and 1", violations=[("attention_mask", "not 0 or 1")]
        )
    lengths = real.sum(axis=1)
    if (lengths == ids.shape[1]).all():
        return None, lengths - 1
    short = np.flatnonzero(lengths < 2)
    if short.size:
        raise BatchError(
            f"row {short[0]} has {lengths[short[0]]} real tokens by its attention_mask; it needs "
            "two: one to read, one to predict",
            violations=[(f"attention_mask[{short[0]}]", "too short")],
        )
    pairs = real[:, :-1] & real[:, 1:]
    holes = np.flatnonzero(pairs.sum(axis=1) != lengths - 1)
    if holes.size:
        raise BatchError(
            f"row {holes[0]} of attention_mask has a hole: padding may stand before or after the "
            "tokens, not between them",
            violations=[(f"attention_mask[{holes[0]}]", "hole")],
        )
    return pairs, lengths - 1


def _pack(
    offsets: Array,
    inputs: Array,
    targets: Array,
    weights: Array,
    more: Mapping[str, Array] | None = None,
    *,
    unit_ids: Sequence[str] = (),
) -> EncodedBatch:
    # Filled in place: messages that are built apart are copied when they are put together.
    message = pb.Batch(unit_ids=unit_ids)
    _fill(message.offsets, types_pb2.DATA_TYPE_INT64, offsets, _INT64)
    _fill(message.input_tokens, types_pb2.DATA_TYPE_INT32, inputs, _INT32)
    add = message.loss_inputs.add
    _fill(add(name="target_tokens").tensor, types_pb2.DATA_TYPE_INT32, targets, _INT32)
    _fill(add(name="weights").tensor, types_pb2.DATA_TYPE_FLOAT32, weights, _FLOAT32)
    for name, array in (more or {}).items():
        if array.dtype == _INT32:
            _fill(add(name=name).tensor, types_pb2.DATA_TYPE_INT32, array, _INT32)
        else:
            _fill(add(name=name).tensor, types_pb2.DATA_TYPE_FLOAT32, array, _FLOAT32)
    return EncodedBatch(message, offsets)


def _fill(
    tensor: types_pb2.Tensor, kind: types_pb2.DataType.ValueType, array: Array, wire: np.dtype[Any]
) -> None:
    # The types are known here, so this skips the checks of tensafe.wire.tensors.encode.
    tensor.dtype = kind
    tensor.shape.extend(array.shape)
    tensor.data = array.astype(wire, copy=False).tobytes()
