"""Copies of weights and optimizer states, for updates that may have to be taken back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_kept = threading.local()


def copies(states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies of several runs' tensors, all on one device and, but for scalars, of one type.

    On a CPU they lie in memory that this thread's next call fills again: to touch fresh memory
    costs five times the copy (docs/benchmarks.md).
    """
    vectors = [tensor for state in states for tensor in state.values() if tensor.ndim]
    if not vectors or vectors[0].device.type != "cpu":
        return [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    room = _room(sum(tensor.numel() for tensor in vectors), vectors[0].dtype)
    rooms = iter(torch.split(room, [tensor.numel() for tensor in vectors]))
    return [
        {
            name: next(rooms).view_as(tensor).copy_(tensor) if tensor.ndim else tensor.clone()
            for name, tensor in state.items()
        }
        for state in states
    ]


def _room(size: int, dtype: torch.dtype) -> Tensor:
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.dtype != dtype or len(room) < size:
        _kept.room = room = torch.empty(size, dtype=dtype)
    return room[:size]
