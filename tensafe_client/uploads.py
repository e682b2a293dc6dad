"""Chunked uploads of adapters that were made elsewhere: resumable, checked on arrival."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from tensafe.v1 import artifacts_pb2, types_pb2
from tensafe.wire.channel import CHUNK_BYTES
from tensafe_client import specs
from tensafe_client.backoff import Backoff, retryable
from tensafe_client.checks import check_path, check_string
from tensafe_client.errors import (
    ChecksumMismatchError,
    InvalidArgumentError,
    TenSafeError,
    from_rpc_error,
)
from tensafe_client.infos import ArtifactInfo
from tensafe_client.session import Session, new_request_id

FILES = ("adapter_config.json", "adapter_model.safetensors")
_ATTEMPTS_DAMAGED = 3
_CHECKED_BYTES_PER_S = 10e6


class Uploads:
    """Uploads of one session; coroutines of the I/O loop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def artifact(
        self,
        directory: str | Path,
        model_ref: str,
        metadata: Mapping[str, Any] | None,
        ttl_s: float | None,
    ) -> ArtifactInfo:
        """Uploads the two files that `peft` saves, and returns the artifact that they become.

        The same files with the same arguments go on where an upload broke off, also in another
        process: the request id is made of them.

        Raises:
            InvalidArgumentError: if a file is missing, or the server refuses one.
        """
        place = check_path("directory", directory)
        request = artifacts_pb2.BeginUploadRequest(model_ref=check_string("model_ref", model_ref))
        if metadata is not None:
            request.metadata.CopyFrom(specs.json_object(metadata))
        if ttl_s is not None:
            request.ttl.CopyFrom(specs.time_to_live(ttl_s))
        for name in FILES:
            request.files.append(await asyncio.to_thread(described, place / name))
        digest = hashlib.sha256(request.SerializeToString(deterministic=True))
        request.request_id = f"upl-{digest.hexdigest()[:48]}"
        for attempt in range(1, _ATTEMPTS_DAMAGED + 1):
            upload = await self._sent(request, place)
            if upload.HasField("artifact"):
                return ArtifactInfo.from_proto(upload.artifact)
            try:
                return await self._finished(upload.upload_id, request)
            except ChecksumMismatchError:  # the server has dropped the file; once more
                if attempt == _ATTEMPTS_DAMAGED:
                    raise
        raise AssertionError("unreachable")

    async def _sent(
        self, request: artifacts_pb2.BeginUploadRequest, directory: Path
    ) -> artifacts_pb2.BeginUploadResponse:
        """Sends what has not arrived, again after a break as long as bytes still arrive."""
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._session.connection.timeout_s
        before = -1
        while True:
            stubs = await self._session.stubs()
            upload: artifacts_pb2.BeginUploadResponse = await self._session.call(
                stubs.artifacts.BeginUpload, request
            )
            arrived = {file.name: file.received_bytes for file in upload.files}
            if sum(arrived.values()) > before:
                before = sum(arrived.values())
                backoff.reset()
                deadline = loop.time() + self._session.connection.timeout_s
            open_files = [f for f in request.files if arrived.get(f.name, 0) < f.size_bytes]
            if upload.HasField("artifact") or not open_files:
                return upload
            try:
                for file in open_files:
                    start = artifacts_pb2.UploadFileStart(
                        upload_id=upload.upload_id, name=file.name, offset=arrived[file.name]
                    )
                    await stubs.artifacts.UploadFile(
                        file_requests(start, directory / file.name, file.size_bytes),
                        metadata=self._session.metadata,
                    )
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
                if not goes_on(error, failure) or loop.time() > deadline:
                    raise failure from None
                await asyncio.sleep(backoff.next_s(failure.retry_delay_s))

    async def _finished(
        self, upload_id: str, upload: artifacts_pb2.BeginUploadRequest
    ) -> ArtifactInfo:
        stubs = await self._session.stubs()
        request = artifacts_pb2.FinishUploadRequest(
            upload_id=upload_id, request_id=new_request_id()
        )
        # The server reads all of it.
        size_bytes = sum(file.size_bytes for file in upload.files)
        limit_s = self._session.connection.timeout_s + size_bytes / _CHECKED_BYTES_PER_S
        response = await self._session.call(
            stubs.artifacts.FinishUpload, request, timeout_s=limit_s
        )
        return ArtifactInfo.from_proto(response.artifact)


def goes_on(error: grpc.aio.AioRpcError, failure: TenSafeError) -> bool:
    """Whether the upload may go on from what has arrived."""
    if error.code() is grpc.StatusCode.OUT_OF_RANGE:  # more has arrived than we were told
        return True
    # A stream that breaks while it is written to ends as INTERNAL or UNKNOWN, without a reason.
    broke = error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return retryable(error) or (broke and not failure.reason)


async def file_requests(
    start: artifacts_pb2.UploadFileStart, path: Path, size_bytes: int
) -> AsyncIterator[artifacts_pb2.UploadFileRequest]:
    yield artifacts_pb2.UploadFileRequest(start=start)
    with path.open("rb") as file:
        file.seek(start.offset)
        offset = start.offset
        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
            chunk = types_pb2.FileChunk(
                name=start.name, offset=offset, data=data, size_bytes=size_bytes
            )
            yield artifacts_pb2.UploadFileRequest(chunk=chunk)
            offset += len(data)


def described(path: Path, argument: str = "directory") -> artifacts_pb2.ArtifactFile:
    """A file's name, size and sum. Blocks.

    Raises:
        InvalidArgumentError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return artifacts_pb2.ArtifactFile(name=path.name, size_bytes=file.tell(), sha256=digest)
    except OSError as error:
        if argument != "directory":
            raise InvalidArgumentError.of(
                argument, f"cannot be read ({error.strerror}: {path})"
            ) from error
        raise InvalidArgumentError.of(
            "directory",
            f"has no {path.name} that can be read ({error.strerror}: {path})",
            remedy=f"name a folder with {' and '.join(FILES)}, as `peft`'s save_pretrained writes",
        ) from error
