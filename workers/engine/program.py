"""Which program computes: a version may be many, on the way to the next."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

_WORKERS = Path(__file__).resolve().parents[1]


@cache
def program() -> str:
    """The installed version, and a digest of the worker's sources as they are."""
    return f"{metadata.version('tensafe')} {digest(_WORKERS)}"


def digest(directory: Path) -> str:
    """16 hexadecimal digits, of all Python files below and of their places."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        source = path.read_bytes()
        found.update(f"{path.relative_to(directory).as_posix()}\0{len(source)}\0".encode())
        found.update(source)
    return found.hexdigest()[:16]
