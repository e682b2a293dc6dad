"""Tensors on the wire: little-endian, row-major buffers with a type and a shape."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe.v1 import types_pb2 as types

Array = NDArray[Any]

_DTYPES: dict[int, np.dtype[Any]] = {
    types.DATA_TYPE_INT32: np.dtype("<i4"),
    types.DATA_TYPE_INT64: np.dtype("<i8"),
    types.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorError(ValueError):
    """A tensor whose type, shape and bytes do not agree."""


def encode(array: Array) -> types.Tensor:
    """Packs an int32, int64, float32 or float64 array.

    Raises:
        TensorError: for another element type.
    """
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _NAMES:
        raise TensorError(f"no wire type for {array.dtype}; use int32, int64, float32 or float64")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return types.Tensor(dtype=_NAMES[dtype], shape=array.shape, data=data)  # type: ignore[arg-type]


def place_in_batch(offsets: Array, row: int) -> tuple[int, int]:
    """The datum that a row of an offset-ragged tensor belongs to, and the row's place in it."""
    datum = int(np.searchsorted(offsets, row, side="right")) - 1
    return datum, row - int(offsets[datum])


def decode(tensor: types.Tensor) -> Array:
    """Unpacks a tensor without copying; the array is read-only.

    bfloat16, which NumPy lacks, is widened to float32.

    Raises:
        TensorError: if the bytes are not itemsize × product(shape) long, or the type is unknown.
    """
    shape, data = tuple(tensor.shape), tensor.data  # each reading of which makes a copy
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is not None:
        if len(shape) == 1 and shape[0] * dtype.itemsize == len(data):
            return np.frombuffer(data, dtype)  # what nearly every tensor is
        _check_length(data, shape, dtype.itemsize)
        return _reshaped(np.frombuffer(data, dtype), shape)
    if tensor.dtype == types.DATA_TYPE_BFLOAT16:
        _check_length(data, shape, 2)
        upper = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return _reshaped(upper.view("<f4"), shape)
    given = f"{tensor.dtype} is unknown" if tensor.dtype else "is not set"
    raise TensorError(f"dtype {given}; use one of the DataType values")


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # an extent of 0 lets the others be beyond what NumPy counts
        raise TensorError(f"shape {list(shape)} has an extent that is too large") from error


def _check_length(data: bytes, shape: tuple[int, ...], itemsize: int) -> None:
    if len(shape) > 4:
        raise TensorError(f"shape {list(shape)} has more than 4 dimensions")
    if shape and min(shape) < 0:
        raise TensorError(f"shape {list(shape)} has a negative extent")
    expected = itemsize * prod(shape)
    if len(data) != expected:
        raise TensorError(f"shape {list(shape)} needs {expected} bytes of data, got {len(data)}")
