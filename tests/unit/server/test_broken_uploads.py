"""A worker's upload whose connection breaks: gRPC may end the stream of its messages as if all of
them had come, and what has come is not taken for the whole."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unit.server.small_store import Small

from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.v1.types_pb2 import FileChunk
from tensafe.wire.status import TenSafeFault
from tensafe_server.api.worker import WorkerServicer

DATA = b"0123"


def chunks(name: str) -> list[FileChunk]:
    """A file in two pieces."""
    digest = hashlib.sha256(DATA).hexdigest()
    return [
        FileChunk(name=name, offset=0, data=DATA[:2], size_bytes=4),
        FileChunk(name=name, offset=2, data=DATA[2:], size_bytes=4, sha256=digest),
    ]


TWO_FILES = [*chunks("a"), *chunks("b")]
BROKEN = pytest.mark.parametrize("arrived", [0, 1, 2, 3])


def servicer(small: Small, stored: dict[str, Sequence[ArtifactFile]]) -> WorkerServicer:
    reception = SimpleNamespace(
        upload_fence=lambda artifact_id, epoch: lambda: None, stored=stored.__setitem__
    )
    parts: list[Any] = [small.store, small.blobs, None, reception, small.book, None]
    return WorkerServicer(*parts)


async def snapshot(arrived: int) -> AsyncIterator[pb.UploadSnapshotRequest]:
    header = pb.SnapshotHeader(
        worker_id="wkr-1", run_id="run-1", epoch=1, seq=1, step=1, file_count=2
    )
    yield pb.UploadSnapshotRequest(header=header)
    for chunk in TWO_FILES[:arrived]:
        yield pb.UploadSnapshotRequest(chunk=chunk)


async def artifact(arrived: int) -> AsyncIterator[pb.UploadArtifactRequest]:
    yield pb.UploadArtifactRequest(artifact_id="art-1", epoch=1, file_count=2)
    for chunk in TWO_FILES[:arrived]:
        yield pb.UploadArtifactRequest(chunk=chunk)


@BROKEN
def test_a_part_of_a_snapshot_is_none(tmp_path: Path, arrived: int):
    async def body(small: Small) -> None:
        small.settle(1)
        with pytest.raises(TenSafeFault, match="of 2 files"):
            await servicer(small, {}).UploadSnapshot(snapshot(arrived), None)
        assert await small.store.snapshots("run-1") == []
        assert small.blob_keys() == []
        assert small.blobs.sweep_partial() == 0

    Small.run(tmp_path, body)


@BROKEN
def test_a_part_of_an_artifact_is_none(tmp_path: Path, arrived: int):
    async def body(small: Small) -> None:
        stored: dict[str, Sequence[ArtifactFile]] = {}
        with pytest.raises(TenSafeFault, match="of 2 files"):
            await servicer(small, stored).UploadArtifact(artifact(arrived), None)
        assert stored == {}

    Small.run(tmp_path, body)


def test_all_of_it_is_taken(tmp_path: Path):
    async def body(small: Small) -> None:
        small.settle(1)
        stored: dict[str, Sequence[ArtifactFile]] = {}
        service = servicer(small, stored)
        await service.UploadArtifact(artifact(4), None)
        assert [file.name for file in stored["art-1"]] == ["a", "b"]
        answer = await service.UploadSnapshot(snapshot(4), None)
        [row] = await small.store.snapshots("run-1")
        assert row.id == answer.snapshot_id

    Small.run(tmp_path, body)
