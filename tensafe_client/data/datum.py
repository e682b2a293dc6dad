"""One training example in the service's own form: nothing is shifted any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensafe.wire.tensors import Array
from tensafe_client.errors import BatchError

IGNORE_INDEX = -100
"""The label that Hugging Face data marks unscored positions with."""

_INT32_MAX = 2**31 - 1


class Datum:
    """One sequence: at position t the model reads `tokens[t]` and predicts `target_tokens[t]`.

        Datum(ids[:-1], ids[1:], weights=completion, logprobs=sampled, advantages=0.7)

    Args:
        tokens: int [T], T ≥ 1: what the model reads.
        target_tokens: int [T]: what it must predict at each position; or [T, K], soft targets.
        weights: float, as many as targets: 0 where nothing is scored. None: all 1; soft targets
            need them.
        unit_id: whose it is, for private runs whose privacy unit is "unit_id".
        inputs: what else the loss takes, by name: [T], or as many as soft targets, or one number
            for all positions. An int32 array stays one; everything else is sent as float32.

    Raises:
        BatchError: if the lengths differ, or a token is negative or no integer.
    """

    __slots__ = ("inputs", "target_tokens", "tokens", "unit_id", "weights")

    def __init__(
        self,
        tokens: Any,
        target_tokens: Any,
        weights: Any = None,
        *,
        unit_id: str | None = None,
        **inputs: Any,
    ) -> None:
        self.unit_id = None if unit_id is None else unit_id_of("unit_id", unit_id)
        self.tokens = token_array("tokens", tokens)
        size = len(self.tokens)
        if size == 0:
            raise BatchError.of("tokens", "is empty: a Datum needs at least one token")
        self.target_tokens = _targets(target_tokens, size)
        if weights is not None:
            self.weights = _weights(weights, self.target_tokens.shape)
        elif self.target_tokens.ndim > 1:
            raise BatchError.of("weights", "must say how much each of the soft targets counts")
        else:
            self.weights = np.ones(size, np.float32)
        self.inputs: dict[str, Array] = {
            name: _input(name, values, self.target_tokens.shape) for name, values in inputs.items()
        }

    @classmethod
    def from_labels(cls, input_ids: Sequence[int] | Array, labels: Sequence[int] | Array) -> Datum:
        """Shifts labels that are aligned with the inputs, as `transformers` does.

        Args:
            input_ids: int [T], T ≥ 2.
            labels: int [T]: the input token where it is to be predicted, −100 elsewhere.
        """
        ids, marks = number_array("input_ids", input_ids), number_array("labels", labels)
        if len(ids) != len(marks):
            raise BatchError.of("labels", f"has {len(marks)} entries for {len(ids)} input_ids")
        if len(ids) < 2:
            raise BatchError.of("input_ids", "needs two tokens: one to read, one to predict")
        scored = marks[1:] != IGNORE_INDEX
        return cls(ids[:-1], np.where(scored, marks[1:], ids[1:]), scored.astype(np.float32))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        scored = self.weights != 0
        count = int(np.count_nonzero(scored if scored.ndim == 1 else scored.any(1)))
        return f"<Datum {len(self)} tokens, {count} scored>"


def unit_id_of(field: str, value: object) -> str:
    """Checks whose a datum is said to be.

    Raises:
        BatchError: if it is no text of 1 to 256 bytes.
    """
    if not isinstance(value, str) or not 1 <= len(value.encode(errors="ignore")) <= 256:
        raise BatchError.of(field, f"must be a text of 1 to 256 bytes, got {value!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BatchError.of(field, "has half of a surrogate pair, which UTF-8 cannot hold")
    return value


def number_array(field: str, values: Any) -> Array:
    """Converts a list, NumPy array or torch tensor to int64 [T].

    Raises:
        BatchError: if it is not one-dimensional, or not of integers.
    """
    array = to_numpy(field, values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BatchError(
            f"{field} must be a one-dimensional list of integers, got "
            f"{array.ndim} dimensions of {array.dtype}",
            violations=[(field, "must be integers")],
        )
    return array.astype(np.int64, copy=False)


def token_array(field: str, values: Any) -> Array:
    """Converts to int32 [T]; refuses what cannot be a token id."""
    array = number_array(field, values)
    check_tokens(field, array)
    return array.astype(np.int32)


def check_tokens(field: str, ids: Array) -> None:
    """Raises BatchError if a value of an int64 array cannot be a token id of any model."""
    # Seen as unsigned, a negative number is a huge one: one pass instead of two.
    if ids.size and ids.view(np.uint64).max() > _INT32_MAX:
        flat = ids.ravel()
        place = int(np.flatnonzero((flat < 0) | (flat > _INT32_MAX))[0])
        where = ", ".join(str(int(i)) for i in np.unravel_index(place, ids.shape))
        raise BatchError(
            f"{field}[{where}] is {int(flat[place])}, which is no token id",
            violations=[(field, "token ids are 0 or more")],
        )


def to_numpy(field: str, values: Any) -> Array:
    """Converts a list, NumPy array or torch tensor (without importing torch)."""
    if isinstance(values, np.ndarray):
        return values
    try:
        if hasattr(values, "detach"):  # a torch tensor, on whatever device
            values = values.detach().cpu()
            if str(values.dtype) == "torch.bfloat16":  # NumPy has no such type
                values = values.float()
            values = values.numpy()
        return np.asarray(values)
    # Ragged, or beyond int64; a tensor that is sparse or has no data.
    except (ValueError, OverflowError, TypeError, RuntimeError) as error:
        raise BatchError.of(field, f"is not an array of numbers: {error}") from error


def _targets(values: Any, size: int) -> Array:
    array = to_numpy("target_tokens", values)
    if array.ndim != 2:
        array = token_array("target_tokens", array)
    elif array.dtype.kind not in "iu" or not array.shape[1]:
        raise BatchError.of("target_tokens", "must be integers, [T] or [T, K]")
    else:
        check_tokens("target_tokens", array.astype(np.int64))
    if len(array) != size:
        raise BatchError(
            f"target_tokens has {len(array)} entries for {size} tokens",
            violations=[("target_tokens", "must be as long as tokens")],
        )
    return array.astype(np.int32, copy=False)


def _weights(values: Any, shape: tuple[int, ...]) -> Array:
    array = to_numpy("weights", values)
    if array.dtype.kind not in "biuf":
        raise BatchError.of("weights", f"must be numbers, got {array.dtype}")
    if array.shape != shape:
        each = "token" if len(shape) == 1 else "soft target"
        raise BatchError(
            f"weights must be {list(shape)} numbers, one for each {each}, got shape "
            f"{list(array.shape)}",
            violations=[("weights", "must be as long as tokens")],
        )
    return array.astype(np.float32)


def _input(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    array = to_numpy(name, values)
    if array.dtype.kind not in "biuf":
        raise BatchError.of(name, f"must be numbers, got {array.dtype}")
    if array.ndim == 0:
        array = np.full(shape[:1], array)
    if array.shape not in (shape, shape[:1]):
        raise BatchError.of(
            name,
            f"must be one number, or {list(shape[:1])}, one for each token, got shape "
            f"{list(array.shape)}",
        )
    return array if array.dtype == np.int32 else array.astype(np.float32)
