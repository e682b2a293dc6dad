"""Which program computes: a version may be many, on the way to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tensafe import wire


def digest(directories: Sequence[Path]) -> str:
    """16 hexadecimal digits, of all Python files below and of their places."""
    found = hashlib.sha256()
    for directory in directories:
        for path in sorted(path for path in directory.rglob("*.py") if path.is_file()):
            source = path.read_bytes()
            found.update(f"{path.relative_to(directory).as_posix()}\0{len(source)}\0".encode())
            found.update(source)
    return found.hexdigest()[:16]


SOURCES = (Path(__file__).resolve().parents[1], Path(wire.__file__).resolve().parent)
"""What decides about bits: all of a worker, and how batches and losses are read."""
PROGRAM = f"{metadata.version('tensafe')} {digest(SOURCES)}"
"""The installed version, and a digest of the sources as they were when this was imported."""
