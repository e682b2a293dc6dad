"""Running out of memory fails one operation, not the worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import torch

from tensafe.wire.status import TenSafeFault


class Spare(Protocol):
    """What is kept for a next time, and can be made again."""

    def release(self) -> None:
        """Lets it go."""


_spare: WeakSet[Spare] = WeakSet()

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def can_spare(one: Spare) -> None:
    """Has it released when anybody lacks memory, for as long as it lives."""
    _spare.add(one)


def give_back() -> None:
    """Gives devices back what is kept for a next time."""
    for one in list(_spare):
        one.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_faults(what: str) -> Iterator[None]:
    """Turns an allocator's error into OUT_OF_MEMORY.

    Raises:
        TenSafeFault: OUT_OF_MEMORY.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        exhausted = True
    else:
        return
    if exhausted:  # outside the handler, so that the traceback's tensors can be freed
        give_back()
    raise TenSafeFault(
        "OUT_OF_MEMORY",
        f"the device has too little memory for this {what}; use shorter sequences, fewer samples, "
        "a smaller rank, or a worker with more memory",
    )


def is_memory_error(error: BaseException) -> bool:
    """Whether an allocator raised it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
