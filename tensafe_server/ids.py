"""Names of things: a prefix that says the kind, then 120 bits that sort by time of creation."""

from __future__ import annotations

import os
import time


def new_id(prefix: str) -> str:
    """A new id: 11 hexadecimal digits of milliseconds since 1970, then 19 random ones."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{os.urandom(10).hex()[:19]}"
