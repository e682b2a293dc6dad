"""Batches go over one stream, and over another when that has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_server import API_KEY, FakeCoordinator

from tensafe_client import ServiceClient, TrainingClient
from tensafe_client.io_loop import io_loop
from tensafe_client.submission import _serialize
from tensafe_client.submit_stream import SubmitStream


def test_batches_share_a_stream(server: FakeCoordinator, tc: TrainingClient) -> None:
    for _ in range(3):
        tc.optim_step().result(timeout=20)
    assert len(server.batches) == 3
    assert server.submit_streams == 1


def test_a_stream_that_ended_between_two_batches_is_opened_anew(
    server: FakeCoordinator, tc: TrainingClient
) -> None:
    tc.optim_step().result(timeout=20)
    server.stop()
    server.start()
    assert tc.optim_step().result(timeout=20).step == 2
    assert server.submit_streams == 2


def test_a_batch_that_is_not_answered_in_time(server: FakeCoordinator) -> None:
    with ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
        session = client._session
        stream = SubmitStream(session.metadata, 0.05)
        server.gate.clear()

        async def send() -> None:
            await stream.send(await session.stubs(), _serialize([], "ses-1"))

        with pytest.raises(grpc.aio.AioRpcError) as raised:
            io_loop().run(send())
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.gate.set()
        stream._timeout_s = 20
        io_loop().run(send())
    assert server.submit_streams == 2


def test_a_stream_that_the_server_ends_without_an_answer(
    server: FakeCoordinator, tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = FakeCoordinator.SubmitStream
    begun: list[int] = []

    def end_the_first(server: FakeCoordinator, requests: Any, context: Any) -> Iterator[Any]:
        begun.append(len(begun))
        if begun[-1]:
            yield from served(server, requests, context)

    monkeypatch.setattr(FakeCoordinator, "SubmitStream", end_the_first)
    server.stop()
    server.start()
    assert tc.optim_step().result(timeout=20).step == 1
    assert begun == [0, 1]
