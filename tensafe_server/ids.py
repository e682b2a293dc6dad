"""Names of things, and numbers that no earlier start of the coordinator has given."""

from __future__ import annotations

import os
import time

_DIGITS = 19
_DRAWN_AT_ONCE = 512
_drawn: list[str] = []
os.register_at_fork(after_in_child=_drawn.clear)  # or both would give the same ids


def new_id(prefix: str) -> str:
    """A new id, which sorts by time of creation: 11 hexadecimal digits of milliseconds since 1970,
    then 19 random ones."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{_random_digits()}"


def _random_digits() -> str:
    """Drawn for many ids at once: each draw is a call into the kernel, for which the thread lets go
    of the interpreter's lock and has to wait for it again."""
    while True:
        try:
            return _drawn.pop()
        except IndexError:
            length = _DRAWN_AT_ONCE * _DIGITS
            digits = os.urandom(length // 2).hex()
            _drawn.extend(digits[i : i + _DIGITS] for i in range(0, length, _DIGITS))


def first_number() -> int:
    """From where a start of the coordinator counts on: microseconds since 1970.

    The store alone cannot tell: a broken disk may have lost what was last written to it, or a
    backup may lie in its place, and neither shows. All that an earlier start has counted up to lies
    below this, unless the clock was set back to before that start.
    """
    return time.time_ns() // 1000
