"""Running out of memory fails one operation, not the worker."""

from __future__ import annotations

import threading
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

_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)
_ONEDNN_SIGNS = (
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)
"""It does not say why: memory for its buffers or for a primitive's code."""


class _Thread(threading.local):
    """Of each thread of Python's: whether oneDNN has lacked memory in it."""

    spoiled: bool = False


_thread = _Thread()


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
    if not isinstance(error, RuntimeError):
        return False
    if any(sign in str(error) for sign in _ONEDNN_SIGNS):
        _thread.spoiled = True
        return True
    return any(sign in str(error) for sign in _SIGNS)


def thread_is_spoiled() -> bool:
    """Whether this thread had better compute nothing more. What generates oneDNN's code keeps a
    thread's first error, lack of memory too, and gives that thread no primitive for another shape
    ever again; another thread gets them."""
    return _thread.spoiled
