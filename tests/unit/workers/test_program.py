"""What the fingerprint says of the program that computes."""

from __future__ import annotations

import shutil
from importlib import metadata

from workers.engine.program import PROGRAM, SOURCES, digest


def test_any_change_of_the_sources_is_another_program(tmp_path):
    copies = [tmp_path / "workers", tmp_path / "wire"]
    for source, copy in zip(SOURCES, copies, strict=True):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert f"{metadata.version('tensafe')} {digest(copies)}" == PROGRAM
    (copies[0] / "__pycache__").mkdir()
    (copies[0] / "__pycache__" / "engine.cpython-311.pyc").write_bytes(b"compiled")
    (copies[0] / ".#editing.py").symlink_to("nowhere")
    found = {digest(copies)}
    for changed in (copies[0] / "engine" / "norms.py", copies[1] / "losses.py"):
        source = changed.read_text()
        changed.write_text(source + "# another")
        found.add(digest(copies))
        changed.write_text(source)
        changed.rename(changed.with_name("renamed.py"))
        found.add(digest(copies))
        changed.with_name("renamed.py").rename(changed)
    assert len(found) == 5
    assert f"{metadata.version('tensafe')} {digest(copies)}" == PROGRAM
