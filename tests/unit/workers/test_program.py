"""What the fingerprint says of the program that computes."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import workers
from workers.engine.program import digest, program

SOURCES = Path(workers.__file__).parent


def test_any_change_of_the_workers_sources_is_another_program(tmp_path):
    copy = tmp_path / "workers"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert program() == f"{metadata.version('tensafe')} {digest(copy)}"
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "engine.cpython-311.pyc").write_bytes(b"compiled")
    assert digest(copy) == digest(SOURCES)
    norms = copy / "engine" / "norms.py"
    source = norms.read_text()
    norms.write_text(source.replace("eps", "epsilon", 1))
    found = {digest(SOURCES), digest(copy)}
    norms.write_text(source)
    assert digest(copy) == digest(SOURCES)
    norms.rename(copy / "engine" / "norm.py")
    assert len(found | {digest(copy)}) == 3
