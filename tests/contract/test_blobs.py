"""What every `BlobStore` must do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensafe_server.blobs.base import BlobNotFoundError, BlobStore
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.blobs.stub import StubBlobStore


@pytest.fixture(params=["local", "stub"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return LocalBlobStore(tmp_path / "blobs") if request.param == "local" else StubBlobStore()


def test_a_blob_is_seen_whole_or_not_at_all(blobs: BlobStore):
    writer = blobs.writer("a/b")
    writer.write(b"half")
    assert not blobs.exists("a/b")
    writer.write(b" and half")
    writer.commit()
    assert blobs.get("a/b") == b"half and half"


def test_an_aborted_blob_leaves_the_old_one(blobs: BlobStore):
    blobs.put("k", b"old")
    writer = blobs.writer("k")
    writer.write(b"new")
    writer.abort()
    assert blobs.get("k") == b"old"


def test_reading_in_pieces_from_an_offset(blobs: BlobStore):
    blobs.put("k", bytes(range(10)))
    assert list(blobs.read("k", 3, 4)) == [bytes([3, 4, 5, 6]), bytes([7, 8, 9])]


def test_a_missing_blob(blobs: BlobStore):
    with pytest.raises(BlobNotFoundError):
        blobs.get("none")
    assert not blobs.exists("none")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", ".hidden", "a//b", "a\0b"])
def test_keys_cannot_leave_the_store(blobs: BlobStore, key: str):
    with pytest.raises(ValueError, match="not a blob key"):
        blobs.put(key, b"x")


def test_a_link_is_not_followed(tmp_path: Path):
    blobs = LocalBlobStore(tmp_path / "blobs")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "blobs" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic link"):
        blobs.get("link")
