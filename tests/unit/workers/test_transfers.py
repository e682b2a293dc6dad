"""Transfers over connections that break: tried again, whatever gRPC calls that."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_status import rpc_status

from tensafe.v1 import artifacts_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault, to_status
from workers import transfers as transfers_module
from workers.transfers import GrpcTransfers

BROKEN = [
    (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    # What grpc.aio says if the connection broke while a message was being written.
    (grpc.StatusCode.INTERNAL, "Internal error from Core"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
    (grpc.StatusCode.CANCELLED, "the server is gone"),
]


def broken(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details)


class Stub:
    """A coordinator that fails calls before it takes one."""

    def __init__(self, *failures: grpc.aio.AioRpcError) -> None:
        self._failures = list(failures)
        self.calls = 0

    async def UploadArtifact(
        self, requests: AsyncIterator[worker_pb2.UploadArtifactRequest], **_: object
    ) -> worker_pb2.UploadArtifactResponse:
        self.calls += 1
        chunks = [request.chunk async for request in requests if request.HasField("chunk")]
        if self._failures:
            raise self._failures.pop(0)
        files = [
            artifacts_pb2.ArtifactFile(name=one.name, size_bytes=one.size_bytes, sha256=one.sha256)
            for one in chunks
        ]
        return worker_pb2.UploadArtifactResponse(files=files)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    monkeypatch.setattr(transfers_module, "_FIRST_PAUSE_S", 0.001)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"0123")
    return tmp_path


def moving(stub: Stub, loop: asyncio.AbstractEventLoop) -> GrpcTransfers:
    return GrpcTransfers(stub, (), loop)  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "details"), BROKEN, ids=[code.name for code, _ in BROKEN])
def test_an_upload_whose_connection_breaks_is_made_again(
    loop: asyncio.AbstractEventLoop, directory: Path, code: grpc.StatusCode, details: str
):
    stub = Stub(broken(code, details), broken(code, details))
    [file] = moving(stub, loop).upload("art-1", 1, directory)
    assert file.sha256 == hashlib.sha256(b"0123").hexdigest()
    assert stub.calls == 3


def test_what_the_coordinator_refuses_is_not_tried_again(
    loop: asyncio.AbstractEventLoop, directory: Path
):
    detail = TenSafeFault("INTERNAL", "the server failed, error id 7").detail
    status = rpc_status.to_status(to_status(detail))
    trailers = grpc.aio.Metadata(*status.trailing_metadata)
    refusal = grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailers, status.details)
    stub = Stub(refusal)
    with pytest.raises(TenSafeFault, match="error id 7"):
        moving(stub, loop).upload("art-1", 1, directory)
    assert stub.calls == 1
