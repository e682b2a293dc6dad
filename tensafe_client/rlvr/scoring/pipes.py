"""Messages over a pair of pipes between this process and its own child: length, then a pickle."""

from __future__ import annotations

import os
import pickle
import select
import struct
import time
from typing import Any

_LENGTH = struct.Struct("<Q")
_READ_BYTES = 1 << 16


class PipeClosedError(Exception):
    """The other side has ended."""


def packed(message: Any) -> bytes:
    """A message's pickle. Functions of the main script are pickled whole."""
    import cloudpickle

    data: bytes = cloudpickle.dumps(message)
    return data


class Pipes:
    """One end of the conversation: two file descriptors, which must not block."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._buffer = bytearray()
        for end in (reads, writes):
            os.set_blocking(end, False)

    def send(self, data: bytes, timeout_s: float | None = None) -> None:
        """Sends what `packed` gave.

        Raises:
            TimeoutError, PipeClosedError: if nobody reads it.
        """
        deadline = _deadline(timeout_s)
        view = memoryview(_LENGTH.pack(len(data)) + data)
        try:
            while view:
                if not select.select([], [self._writes], [], _left_s(deadline))[1]:
                    raise TimeoutError
                view = view[os.write(self._writes, view) :]
        except BrokenPipeError:
            raise PipeClosedError from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """Waits for the next message; None: without end.

        Raises:
            TimeoutError, PipeClosedError: if it does not come.
        """
        deadline = _deadline(timeout_s)
        (size,) = _LENGTH.unpack(self._take(_LENGTH.size, deadline))
        return pickle.loads(self._take(size, deadline))  # noqa: S301

    def _take(self, size: int, deadline: float | None) -> bytes:
        while len(self._buffer) < size:
            if not select.select([self._reads], [], [], _left_s(deadline))[0]:
                raise TimeoutError
            data = os.read(self._reads, _READ_BYTES)
            if not data:
                raise PipeClosedError
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _left_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
