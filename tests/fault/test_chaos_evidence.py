"""A chaos run that fails says why and where its logs are, and they stay there."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault import chaos_evidence
from fault.chaos_evidence import kept_on_failure
from harness.cluster import Cluster


def test_what_a_failed_run_wrote_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chaos_evidence, "KEPT", tmp_path / "kept")
    cluster = Cluster(tmp_path / "home")
    (cluster.home / "worker-0.log").write_text("first\nlast words")
    cluster.data.mkdir()
    (cluster.data / "tensafe.db").write_bytes(b"rows")
    with (
        pytest.raises(AssertionError, match="seed-7: ValueError: the full text") as failed,
        kept_on_failure(cluster, "seed-7"),
    ):
        raise ValueError("the full text")
    [folder] = (tmp_path / "kept").iterdir()
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    assert kept["worker-0.log"] == "first\nlast words"
    assert kept["tensafe.db"] == "rows"
    assert "ValueError: the full text" in kept["failure.txt"]
    for name in kept:
        assert str(folder / name) in str(failed.value)
    assert "last words" in str(failed.value)


def test_a_run_that_goes_well_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chaos_evidence, "KEPT", tmp_path / "kept")
    with kept_on_failure(Cluster(tmp_path / "home"), "seed-7"):
        pass
    assert not (tmp_path / "kept").exists()
