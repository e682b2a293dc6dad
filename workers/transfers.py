"""Moves artifacts over WorkerService, in chunks of 1 MiB, every file's SHA-256 checked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_status import rpc_status

from tensafe.v1 import artifacts_pb2, types_pb2, worker_pb2
from tensafe.wire.channel import CHUNK_BYTES
from tensafe.wire.status import REASON_CODES, TenSafeFault, from_status

if TYPE_CHECKING:
    from tensafe.v1.worker_pb2_grpc import WorkerServiceAsyncStub

T = TypeVar("T")
_ATTEMPTS = 8
_FIRST_PAUSE_S = 0.2
_TIMEOUT_S = 600.0


class GrpcTransfers:
    """Moves artifacts on the link's event loop, for the executor's thread, which waits.

    A connection that breaks is tried again, with growing pauses; one that stays away fails the
    operation at hand.

    Attributes:
        worker_id: what the coordinator calls this worker since the stream stands.
    """

    def __init__(
        self,
        stub: WorkerServiceAsyncStub,
        metadata: Sequence[tuple[str, str]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._stub = stub
        self._metadata = tuple(metadata)
        self._loop = loop
        self.worker_id = ""
        self._moving: set[concurrent.futures.Future[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """Breaks off the transfers at hand, and takes no more."""
        self._closed = True
        for moving in list(self._moving):
            moving.cancel()

    def upload(
        self, artifact_id: str, epoch: int, directory: Path
    ) -> Sequence[artifacts_pb2.ArtifactFile]:
        """Stores every file of a directory; the answer is in name order. `epoch` is that of the
        run's assignment: a stale one is refused.

        Raises:
            TenSafeFault: CHECKSUM_MISMATCH if what was stored is not what was sent.
        """
        paths = sorted(directory.iterdir())
        sent = {path.name: _digest(path) for path in paths}

        async def attempt() -> Sequence[artifacts_pb2.ArtifactFile]:
            response = await self._stub.UploadArtifact(
                _upload_requests(artifact_id, epoch, paths),
                metadata=self._metadata,
                timeout=_TIMEOUT_S,
                wait_for_ready=True,
            )
            return response.files

        files = self._run(attempt)
        if {file.name: file.sha256 for file in files} != sent:
            raise TenSafeFault(
                "CHECKSUM_MISMATCH",
                f"artifact {artifact_id} was not stored as it was sent; save again",
                artifact_id=artifact_id,
            )
        return files

    def fetch(self, artifact_id: str, directory: Path) -> None:
        """Writes the artifact's files into a directory.

        Raises:
            TenSafeFault: ARTIFACT_NOT_FOUND, CHECKSUM_MISMATCH.
        """

        async def attempt() -> None:
            call = self._stub.FetchArtifact(
                worker_pb2.FetchArtifactRequest(artifact_id=artifact_id),
                metadata=self._metadata,
                timeout=_TIMEOUT_S,
                wait_for_ready=True,
            )
            try:
                await _write_files(call, directory)
            finally:
                call.cancel()

        self._run(attempt)

    def upload_snapshot(
        self, run_id: str, epoch: int, seq: int, step: int, directory: Path
    ) -> str | None:
        """Stores a snapshot; None if the coordinator kept it, else why not."""
        response = self._upload_snapshot(directory, run_id=run_id, epoch=epoch, seq=seq, step=step)
        return None if response.snapshot_id else response.refusal

    def upload_private_step(
        self, run_id: str, epoch: int, seq: int, step: int, charge_id: str, directory: Path
    ) -> str:
        """Stores the state right after a private update; its snapshot's id.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT if the coordinator does not want it now.
        """
        response = self._upload_snapshot(
            directory, run_id=run_id, epoch=epoch, seq=seq, step=step, charge_id=charge_id
        )
        if not response.snapshot_id:
            raise TenSafeFault("STALE_ASSIGNMENT", response.refusal, run_id=run_id)
        return response.snapshot_id

    def _upload_snapshot(self, directory: Path, **fields: Any) -> worker_pb2.UploadSnapshotResponse:
        paths = sorted(directory.iterdir())
        header = worker_pb2.SnapshotHeader(
            worker_id=self.worker_id, file_count=len(paths), **fields
        )

        async def attempt() -> worker_pb2.UploadSnapshotResponse:
            return await self._stub.UploadSnapshot(
                _snapshot_requests(header, paths), metadata=self._metadata, timeout=_TIMEOUT_S
            )

        # Not tried again: the stream that the header names is gone with the connection.
        return self._run(attempt, attempts=1)

    def fetch_private_batch(
        self, operation_id: str, charge_id: str
    ) -> Sequence[worker_pb2.FetchPrivateBatchResponse]:
        """The rows that were drawn for a private step, in pieces of whole units.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT.
        """

        async def attempt() -> Sequence[worker_pb2.FetchPrivateBatchResponse]:
            call = self._stub.FetchPrivateBatch(
                worker_pb2.FetchPrivateBatchRequest(
                    worker_id=self.worker_id, operation_id=operation_id, charge_id=charge_id
                ),
                metadata=self._metadata,
                timeout=_TIMEOUT_S,
                wait_for_ready=True,
            )
            try:
                return [piece async for piece in call]
            finally:
                call.cancel()

        return self._run(attempt)

    def fetch_snapshot(self, snapshot_id: str, directory: Path) -> None:
        """Writes the snapshot's files into a directory.

        Raises:
            TenSafeFault: CHECKSUM_MISMATCH if it is damaged or gone.
        """

        async def attempt() -> None:
            call = self._stub.FetchSnapshot(
                worker_pb2.FetchSnapshotRequest(snapshot_id=snapshot_id),
                metadata=self._metadata,
                timeout=_TIMEOUT_S,
                wait_for_ready=True,
            )
            try:
                await _write_files(call, directory)
            finally:
                call.cancel()

        self._run(attempt)

    def _run(self, attempt: Callable[[], Awaitable[T]], attempts: int = _ATTEMPTS) -> T:
        if self._closed:
            raise concurrent.futures.CancelledError
        moving = asyncio.run_coroutine_threadsafe(_with_retries(attempt, attempts), self._loop)
        self._moving.add(moving)
        try:
            return moving.result()
        except grpc.aio.AioRpcError as error:
            raise _named(error) from error
        finally:
            self._moving.discard(moving)


async def _with_retries(attempt: Callable[[], Awaitable[T]], attempts: int) -> T:
    for number in range(attempts):
        try:
            return await attempt()
        except grpc.aio.AioRpcError as error:
            if number == attempts - 1 or not _may_pass(error):
                raise
            await asyncio.sleep(min(10.0, _FIRST_PAUSE_S * 2**number) * random.uniform(0.5, 1.0))  # noqa: S311
    raise AssertionError("unreachable")


def _may_pass(error: grpc.aio.AioRpcError) -> bool:
    """Whether another try may succeed: the coordinator is away, or the connection broke. One that
    breaks while a stream is written to ends as INTERNAL or UNKNOWN, without a reason of ours."""
    if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return not isinstance(_named(error), TenSafeFault)
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _named(error: grpc.aio.AioRpcError) -> Exception:
    """The coordinator's own fault, where it has told one."""
    status = rpc_status.from_call(error)
    detail = from_status(status) if status is not None else None
    if detail is None or detail.reason not in REASON_CODES:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return TenSafeFault("ARTIFACT_NOT_FOUND", f"{error.details()}; list the artifacts")
        return error
    metadata: dict[str, Any] = {k: v for k, v in detail.metadata.items() if k != "field"}
    return TenSafeFault(detail.reason, detail.message, **metadata)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _upload_requests(
    artifact_id: str, epoch: int, paths: Sequence[Path]
) -> AsyncIterator[worker_pb2.UploadArtifactRequest]:
    yield worker_pb2.UploadArtifactRequest(
        artifact_id=artifact_id, epoch=epoch, file_count=len(paths)
    )
    for path in paths:
        for chunk in file_chunks(path):
            yield worker_pb2.UploadArtifactRequest(chunk=chunk)


async def _snapshot_requests(
    header: worker_pb2.SnapshotHeader, paths: Sequence[Path]
) -> AsyncIterator[worker_pb2.UploadSnapshotRequest]:
    yield worker_pb2.UploadSnapshotRequest(header=header)
    for path in paths:
        chunks = file_chunks(path)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield worker_pb2.UploadSnapshotRequest(chunk=chunk)


def file_chunks(path: Path) -> Iterator[types_pb2.FileChunk]:
    """A file in pieces of 1 MiB; an empty file is one empty piece."""
    size, offset, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while True:
            data = file.read(CHUNK_BYTES)
            digest.update(data)
            end = offset + len(data)
            last = end >= size or not data
            yield types_pb2.FileChunk(
                name=path.name,
                offset=offset,
                data=data,
                size_bytes=size,
                sha256=digest.hexdigest() if last else "",
            )
            if last:
                return
            offset = end


async def _write_files(
    chunks: AsyncIterator[worker_pb2.FetchArtifactResponse | worker_pb2.FetchSnapshotResponse]
    | Any,
    directory: Path,
) -> None:
    digest, position, name = hashlib.sha256(), 0, ""
    async for response in chunks:
        chunk = response.chunk
        if chunk.offset == 0:
            digest, position, name = hashlib.sha256(), 0, Path(chunk.name).name
        if chunk.name != name or chunk.offset != position:
            raise _broken(chunk.name)
        digest.update(chunk.data)
        position += len(chunk.data)
        with (directory / name).open("wb" if chunk.offset == 0 else "ab") as file:
            file.write(chunk.data)
        if chunk.sha256 and (position != chunk.size_bytes or digest.hexdigest() != chunk.sha256):
            raise _broken(chunk.name)
        if position == chunk.size_bytes and not chunk.sha256:
            raise _broken(chunk.name)


def _broken(name: str) -> TenSafeFault:
    return TenSafeFault(
        "CHECKSUM_MISMATCH",
        f"file {name!r} of the artifact arrived with other bytes than were stored; try again, or "
        "use another artifact",
        file=name,
    )
