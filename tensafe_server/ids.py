"""Names of things, and numbers that no earlier start of the coordinator has given."""

from __future__ import annotations

import os
import time


def new_id(prefix: str) -> str:
    """A new id, which sorts by time of creation: 11 hexadecimal digits of milliseconds since 1970,
    then 19 random ones."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{os.urandom(10).hex()[:19]}"


def first_number() -> int:
    """From where a start of the coordinator counts on: microseconds since 1970.

    The store alone cannot tell: a broken disk may have lost what was last written to it, or a
    backup may lie in its place, and neither shows. All that an earlier start has counted up to lies
    below this, unless the clock was set back to before that start.
    """
    return time.time_ns() // 1000
