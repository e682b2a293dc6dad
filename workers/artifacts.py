"""Artifacts on the worker's side: what moves them, which are kept at hand, how one is described."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tensafe.v1 import artifacts_pb2, worker_pb2
from workers.disk import own_disk
from workers.operations import SaveOutcome

_KEPT = 8


class Transfers(Protocol):
    """Moves artifacts; calls block until the files have moved and their sums agree."""

    def upload(
        self, artifact_id: str, epoch: int, directory: Path
    ) -> Sequence[artifacts_pb2.ArtifactFile]:
        """Stores every file of a directory under the run's assignment `epoch`; the answer is in
        name order."""

    def fetch(self, artifact_id: str, directory: Path) -> None:
        """Writes the artifact's files into an existing directory."""

    def upload_snapshot(
        self, run_id: str, epoch: int, seq: int, step: int, directory: Path
    ) -> str | None:
        """Stores a snapshot; None if the coordinator kept it, else why not. From any thread."""

    def upload_private_step(
        self, run_id: str, epoch: int, seq: int, step: int, charge_id: str, directory: Path
    ) -> str:
        """Stores the state right after a private update; its snapshot's id. From any thread.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT if the coordinator does not want it now.
        """

    def fetch_private_batch(
        self, operation_id: str, charge_id: str
    ) -> Sequence[worker_pb2.FetchPrivateBatchResponse]:
        """The rows that were drawn for a private step, in pieces of whole units."""

    def fetch_snapshot(self, snapshot_id: str, directory: Path) -> None:
        """Writes the snapshot's files into an existing directory."""


class ArtifactCache:
    """The artifacts used last, on disk. An artifact never changes, so a copy never goes stale."""

    def __init__(self, transfers: Transfers, kept: int = _KEPT) -> None:
        self._transfers = transfers
        self._kept = kept
        self._root = Path(tempfile.mkdtemp(prefix="tensafe-artifacts-"))
        self._directories: OrderedDict[str, Path] = OrderedDict()

    def directory(self, artifact_id: str) -> Path:
        """Where the artifact's files lie; fetched if they are not here. Good until `kept` other
        artifacts have been asked for.

        Raises:
            TenSafeFault: WORKER_DISK_FULL, or why it could not be fetched.
        """
        if artifact_id in self._directories:
            self._directories.move_to_end(artifact_id)
            return self._directories[artifact_id]
        with own_disk():
            directory = self._fetch(artifact_id)
        self._directories[artifact_id] = directory
        if len(self._directories) > self._kept:
            shutil.rmtree(self._directories.popitem(last=False)[1])
        return directory

    def _fetch(self, artifact_id: str) -> Path:
        directory = Path(tempfile.mkdtemp(dir=self._root))
        try:
            self._transfers.fetch(artifact_id, directory)
        except BaseException:
            shutil.rmtree(directory)
            raise
        return directory

    def at_hand(self, most: int) -> frozenset[str]:
        """Those that were asked for last, at most so many; fewer than are kept, so that asking for
        all of them takes none of them away."""
        return frozenset(list(self._directories)[-min(most, self._kept) :])

    def close(self) -> None:
        """Removes every copy."""
        shutil.rmtree(self._root, ignore_errors=True)


def artifact_message(
    artifact_id: str,
    run_id: str,
    outcome: SaveOutcome,
    has_optimizer: bool,
    files: Sequence[artifacts_pb2.ArtifactFile],
) -> artifacts_pb2.Artifact:
    """Describes a stored artifact, its digest as `sha256sum` would list the files."""
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    artifact = artifacts_pb2.Artifact(
        id=artifact_id,
        run_id=run_id,
        model_ref=outcome.model_ref,
        step=outcome.step,
        size_bytes=sum(file.size_bytes for file in files),
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        has_optimizer=has_optimizer,
        files=files,
    )
    artifact.created_at.GetCurrentTime()
    return artifact
