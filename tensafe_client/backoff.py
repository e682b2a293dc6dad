"""When to try again: exponential backoff with full jitter, and which errors allow a retry."""

from __future__ import annotations

import random

import grpc

from tensafe_client.errors import TenSafeError, from_rpc_error

FIRST_S = 0.05
LONGEST_S = 5.0

_jitter = random.Random()  # noqa: S311 - spreads reconnects, guards nothing


class Backoff:
    """Delays that double from 50 ms to 5 s, each drawn between half and whole of its bound."""

    def __init__(self) -> None:
        self._bound_s = FIRST_S

    def next_s(self, asked_s: float | None = None) -> float:
        """Returns the next delay, seconds; at least `asked_s` where the server named one."""
        delay = self._bound_s * (0.5 + 0.5 * _jitter.random())
        self._bound_s = min(LONGEST_S, 2 * self._bound_s)
        if asked_s is not None:
            delay = max(delay, asked_s * (1 + 0.1 * _jitter.random()))
        return delay

    def reset(self) -> None:
        """Begins again, after a success."""
        self._bound_s = FIRST_S


def retryable(error: grpc.aio.AioRpcError) -> bool:
    """Tells whether a call may be repeated: it did not reach the server, or it asks for that.

    A CANCELLED that comes from the other side is a server that sheds load or goes away.
    """
    code = error.code()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return True
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return from_rpc_error(error).retry_delay_s is not None
    return False


def asks_for_retry(error: TenSafeError) -> bool:
    """Tells whether one refused operation of a batch may be sent again: a full queue, a drain."""
    return error.retry_delay_s is not None and error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
