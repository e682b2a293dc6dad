"""Running out of memory fails one operation, not the worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tensafe.wire.status import TenSafeFault

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


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
    # Outside the handler, so that the traceback's tensors can be freed.
    if exhausted and torch.cuda.is_available():
        torch.cuda.empty_cache()
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
