"""Chunked downloads: resumable, checked against SHA-256, each file moved into place whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import grpc

from tensafe.v1 import artifacts_pb2, models_pb2
from tensafe_client.api import Api
from tensafe_client.backoff import Backoff, retryable
from tensafe_client.checks import check_path, check_string
from tensafe_client.errors import ChecksumMismatchError, ConfigError, ServerError, from_rpc_error
from tensafe_client.infos import ArtifactFile
from tensafe_client.session import Session

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HASH_BYTES = 2**20
_STATE_FILES = ("state.json", "optimizer.safetensors", "accumulator.safetensors")
"""What only some artifacts have beside the adapter."""


class Downloads:
    """Downloads of one session; coroutines of the I/O loop."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._api = Api(session)

    async def artifact(self, artifact_id: str, directory: str | Path) -> Path:
        """Downloads the files of an artifact into a directory, which is made if need be.

        A file that is there and right is kept; one that was begun (`NAME.part`) goes on where it
        stopped.

        Raises:
            ChecksumMismatchError: if what came is not what was saved; the part is deleted.
            ConfigError: if the directory cannot be made or written, or holds files of another
                artifact that this one would not replace.
        """
        place = check_path("directory", directory)
        info = await self._api.artifact(artifact_id)
        names = {file.name for file in info.files}
        others = [name for name in _STATE_FILES if name not in names and (place / name).exists()]
        if others:
            raise ConfigError.of(
                "directory",
                f"holds {', '.join(others)} of another artifact, which {info.id} does not have "
                f"({place}); the two would be mixed",
                remedy="choose another directory, or remove what is there",
            )
        try:
            await asyncio.to_thread(place.mkdir, parents=True, exist_ok=True)
            for file in info.files:
                check_name(file.name)
                target = place / file.name
                if await asyncio.to_thread(_digest_of, target) != file.sha256:
                    await self._file(info.id, file, target)
        except OSError as error:
            raise ConfigError.of(
                "directory",
                f"cannot be written: {error.strerror or error} ({place})",
                remedy="choose a directory that you may write, with room for the artifact; what "
                "has arrived is kept there, and the same call goes on with it",
            ) from error
        return place

    async def tokenizer(self, model_ref: str) -> dict[str, bytes]:
        """Fetches the tokenizer's files into memory; they are small."""
        backoff = Backoff()
        deadline = asyncio.get_running_loop().time() + self._session.connection.timeout_s
        while True:
            try:
                return await self._tokenizer_once(model_ref)
            except grpc.aio.AioRpcError as error:
                delay_s = backoff.next_s()
                late = asyncio.get_running_loop().time() + delay_s > deadline
                if late or not retryable(error):
                    raise from_rpc_error(error) from None
            await asyncio.sleep(delay_s)

    async def _file(self, artifact_id: str, file: ArtifactFile, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        writer = await asyncio.to_thread(_PartWriter, part)
        try:
            await self._fill(artifact_id, file, writer)
        finally:
            await asyncio.to_thread(writer.close)
        if writer.digest.hexdigest() != file.sha256:
            part.unlink()
            raise ChecksumMismatchError(
                f"{file.name} of {artifact_id} came with SHA-256 {writer.digest.hexdigest()}, "
                f"expected {file.sha256}",
                code="DATA_LOSS",
                metadata={"artifact_id": artifact_id, "file": file.name},
                remedy="download it again; if that fails too, the stored artifact is damaged",
            )
        await asyncio.to_thread(os.replace, part, target)

    async def _fill(self, artifact_id: str, file: ArtifactFile, writer: _PartWriter) -> None:
        """Fetches from where the part ends, again after a break as long as bytes still come."""
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._session.connection.timeout_s
        while writer.size_bytes < file.size_bytes:
            before = writer.size_bytes
            stubs = await self._session.stubs()  # says so if the client was closed meanwhile
            request = artifacts_pb2.DownloadArtifactRequest(
                artifact_id=artifact_id, file=file.name, offset=before
            )
            call = stubs.artifacts.DownloadArtifact(request, metadata=self._session.metadata)
            try:
                async for response in call:
                    await self._write(file, writer, response.chunk)
                if writer.size_bytes == before:
                    raise ServerError(f"the server ended {file.name} of {artifact_id} too early")
            except grpc.aio.AioRpcError as error:
                if not retryable(error) or loop.time() > deadline:
                    raise from_rpc_error(error) from None
                await asyncio.sleep(backoff.next_s())
            finally:
                call.cancel()
            if writer.size_bytes > before:
                backoff.reset()
                deadline = loop.time() + self._session.connection.timeout_s

    @staticmethod
    async def _write(file: ArtifactFile, writer: _PartWriter, chunk: Any) -> None:
        if chunk.name != file.name or chunk.offset != writer.size_bytes:
            raise ServerError(
                f"the server sent {chunk.name!r} from {chunk.offset}, expected {file.name!r} from "
                f"{writer.size_bytes}"
            )
        await asyncio.to_thread(writer.write, chunk.data)

    async def _tokenizer_once(self, model_ref: str) -> dict[str, bytes]:
        stubs = await self._session.stubs()
        files: dict[str, bytearray] = {}
        request = models_pb2.GetTokenizerRequest(model_ref=check_string("model_ref", model_ref))
        call = stubs.models.GetTokenizer(
            request, metadata=self._session.metadata, timeout=self._session.connection.timeout_s
        )
        try:
            async for response in call:
                chunk = response.chunk
                data = files.setdefault(check_name(chunk.name), bytearray())
                if chunk.offset != len(data):
                    raise ServerError(f"the chunks of {chunk.name} have a gap at {len(data)}")
                data += chunk.data
                if chunk.sha256 and hashlib.sha256(data).hexdigest() != chunk.sha256:
                    raise ChecksumMismatchError(
                        f"{chunk.name} of model {model_ref} does not match its checksum",
                        code="DATA_LOSS",
                        metadata={"model_ref": model_ref, "file": chunk.name},
                    )
        finally:
            call.cancel()
        return {name: bytes(data) for name, data in files.items()}


class _PartWriter:
    """A file that grows, and the digest of all of it; the bytes already there count."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._file = path.open("a+b")
        self._file.seek(0)
        while block := self._file.read(_HASH_BYTES):
            self.digest.update(block)
        self.size_bytes = self._file.tell()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size_bytes += len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def check_name(name: str) -> str:
    """Refuses a file name that could leave its directory, whatever the server says."""
    if not _SAFE_NAME.fullmatch(name):
        raise ServerError(f"the server sent an unsafe file name: {name!r}")
    return name


def _digest_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
