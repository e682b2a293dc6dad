"""The link against a coordinator of a few lines, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import defaultdict

import grpc
import pytest
from unit.workers.planned import assignment, forward_backward, operation, plan

from tensafe.v1 import artifacts_pb2, training_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from tensafe.wire.channel import server_options
from tensafe.wire.status import from_status
from tensafe.wire.tls import Address
from workers.link import Link, LinkError, LinkOptions
from workers.mock import MockBackend
from workers.transfers import file_chunks

KEY = "ts_worker"
OPTIM = {"optim_step": training_pb2.OptimStep()}
END = object()


class Coordinator(worker_pb2_grpc.WorkerServiceServicer):
    """Keeps what a worker says, and sends what a test puts into `down`."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.registers: asyncio.Queue = asyncio.Queue()
        self.said: asyncio.Queue = asyncio.Queue()
        self.down: asyncio.Queue = asyncio.Queue()
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.corrupt = False

    async def _authenticate(self, context) -> None:
        if ("authorization", f"Bearer {KEY}") not in tuple(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such key")

    async def PublishModel(self, request, context):
        await self._authenticate(context)
        self.published.append(request.model.name)
        return worker_pb2.PublishModelResponse()

    async def Connect(self, requests, context):
        await self._authenticate(context)
        first = await anext(aiter(requests))
        self.registers.put_nowait(first.register)
        yield worker_pb2.ConnectResponse(welcome=worker_pb2.Welcome(worker_id="wkr-1"))

        async def read() -> None:
            async for request in requests:
                self.said.put_nowait(request)
            self.down.put_nowait(END)

        reader = asyncio.create_task(read())
        try:
            while (message := await self.down.get()) is not END:
                yield message
        finally:
            reader.cancel()

    async def UploadArtifact(self, requests, context):
        await self._authenticate(context)
        artifact_id, files = "", defaultdict(bytes)
        async for request in requests:
            if request.WhichOneof("message") == "artifact_id":
                artifact_id = request.artifact_id
            else:
                chunk = request.chunk
                assert chunk.offset == len(files[chunk.name])
                files[chunk.name] += chunk.data
        self.artifacts[artifact_id] = dict(files)
        return worker_pb2.UploadArtifactResponse(
            files=[
                artifacts_pb2.ArtifactFile(
                    name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
                )
                for name, data in sorted(files.items())
            ]
        )

    async def FetchArtifact(self, request, context):
        await self._authenticate(context)
        files = self.artifacts.get(request.artifact_id)
        if files is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such artifact")
        for name, data in files.items():
            yield worker_pb2.FetchArtifactResponse(
                chunk=types_pb2.FileChunk(
                    name=name,
                    data=data[::-1] if self.corrupt else data,
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            )

    async def outcomes(self, count: int) -> list:
        """The next `count` outcomes, in order."""
        done = []
        while len(done) < count:
            done += (await self.said.get()).report.done
        return done

    def send(self, *operations, runs=()) -> None:
        self.down.put_nowait(worker_pb2.ConnectResponse(plan=plan(*operations, runs=runs)))


@contextlib.asynccontextmanager
async def serving(port: int = 0):
    """A coordinator and its port; dropped without grace at the end."""
    coordinator = Coordinator()
    server = grpc.aio.server(options=server_options())
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield coordinator, port
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def linked(port: int, key: str = KEY):
    """A running link and its task."""
    link = Link(LinkOptions(Address("127.0.0.1", port), key, "test"), MockBackend())
    task = asyncio.create_task(link.run())
    try:
        yield link, task
    finally:
        link.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def scenario(test):
    """Runs an async test, at most 30 s."""

    def run():
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__ = test.__name__
    return run


@scenario
async def test_register_plan_report_goodbye():
    async with serving() as (coordinator, port), linked(port) as (link, task):
        register = await coordinator.registers.get()
        assert coordinator.published == ["mock"]
        assert (register.name, register.backend, list(register.models)) == (
            "test",
            "mock",
            ["mock"],
        )
        assert register.credits == 1024
        assert register.fingerprint["backend"] == "mock"
        coordinator.send(
            operation(1, **forward_backward()), operation(2, **OPTIM), runs=[assignment()]
        )
        first, second = await coordinator.outcomes(2)
        assert first.operation_id == "op-run-1-1"
        assert second.result.optim_step.step == 1
        link.stop()
        assert (await coordinator.said.get()).HasField("goodbye")
        await task


@scenario
async def test_what_has_not_begun_is_handed_back_with_goodbye():
    async with serving() as (coordinator, port), linked(port) as (_, task):
        await coordinator.registers.get()
        operations = [operation(seq, **forward_backward()) for seq in range(1, 1000)]
        coordinator.down.put_nowait(worker_pb2.ConnectResponse(drain=worker_pb2.Drain()))
        coordinator.send(*operations, runs=[assignment()])
        await task  # by itself, without having been told to hurry
        said = [coordinator.said.get_nowait() for _ in range(coordinator.said.qsize())]
        assert [message.WhichOneof("message") for message in said].count("goodbye") == 1
        done = [item.operation_id for message in said for item in message.report.done]
        assert done == [one.operation_id for one in operations[: len(done)]]
        assert len(done) < len(operations)


@scenario
async def test_a_restarted_coordinator_finds_the_run_again():
    async with contextlib.AsyncExitStack() as stack:
        async with serving() as (coordinator, port):
            link, task = await stack.enter_async_context(linked(port))
            await coordinator.registers.get()
            coordinator.send(
                operation(1, epoch=4, **forward_backward()), runs=[assignment(epoch=4)]
            )
            await coordinator.outcomes(1)
        async with serving(port) as (coordinator, _):
            register = await coordinator.registers.get()
            (held,) = register.held_runs
            assert (held.run_id, held.epoch, held.last_seq) == ("run-1", 4, 1)
            assert coordinator.published == ["mock"]
            coordinator.send(operation(2, epoch=4, **OPTIM))
            (done,) = await coordinator.outcomes(1)
            assert done.result.optim_step.step == 1
            link.stop()
            await task


@scenario
async def test_artifacts_travel_and_their_sums_are_checked():
    async with serving() as (coordinator, port), linked(port):
        await coordinator.registers.get()
        save = {"save_state": training_pb2.SaveState(metadata={"note": "x"})}
        load = {"load_state": training_pb2.LoadState(artifact_id="art-1")}
        coordinator.send(
            operation(1, **save, artifact_id="art-1"), operation(2, **load), runs=[assignment()]
        )
        saved, loaded = await coordinator.outcomes(2)
        artifact = saved.result.save_state.artifact
        # The caller's own object is the coordinator's to add.
        assert not artifact.HasField("metadata")
        assert [file.name for file in artifact.files] == list(coordinator.artifacts["art-1"])
        assert loaded.result.load_state.artifact_id == "art-1"
        coordinator.corrupt = True
        coordinator.artifacts["art-2"] = coordinator.artifacts["art-1"]
        coordinator.send(
            operation(3, load_state=training_pb2.LoadState(artifact_id="art-2")),
            operation(4, load_state=training_pb2.LoadState(artifact_id="art-3")),
        )
        reasons = [from_status(item.error).reason for item in await coordinator.outcomes(2)]
        assert reasons == ["CHECKSUM_MISMATCH", "ARTIFACT_NOT_FOUND"]


@scenario
async def test_a_run_is_given_up_behind_what_was_told_of_it():
    def explode(*_):
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.wire.forward_backward_result", explode)
        async with serving() as (coordinator, port), linked(port):
            await coordinator.registers.get()
            coordinator.send(operation(1, **forward_backward()), runs=[assignment()])
            reports = []
            while not (reports and reports[-1].refused):
                reports.append((await coordinator.said.get()).report)
    assert [done.HasField("error") for report in reports[:-1] for done in report.done] == [True]
    assert not reports[-1].done


@scenario
async def test_a_refused_key_ends_the_worker():
    async with serving() as (_, port), linked(port, key="ts_wrong") as (_, task):
        with pytest.raises(LinkError, match="UNAUTHENTICATED: no such key"):
            await task


@scenario
async def test_stop_without_a_coordinator():
    async with serving() as (_, port):
        pass
    async with linked(port) as (link, task):
        link.stop()
        await task


def test_file_chunks(tmp_path):
    for size in (0, 1, 2**20, 2**20 + 1):
        path = tmp_path / f"file{size}"
        path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        chunks = list(file_chunks(path))
        assert b"".join(chunk.data for chunk in chunks) == path.read_bytes()
        assert [chunk.offset for chunk in chunks] == list(range(0, max(size, 1), 2**20))
        assert all(chunk.size_bytes == size for chunk in chunks)
        sums = [chunk.sha256 for chunk in chunks]
        assert sums[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not any(sums[:-1])
