"""A worker that does and says what a test wants, message by message."""

from __future__ import annotations

import hashlib
import queue
import secrets
from collections.abc import Iterator, Sequence

import grpc

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1 import worker_pb2_grpc
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.v1.models_pb2 import Model
from tensafe.v1.types_pb2 import FileChunk

Stream = Iterator[pb.ConnectResponse]


class ScriptedWorker:
    """A worker whose every message is the test's.

    Attributes:
        stream: what the coordinator sends over the newest one.
    """

    def __init__(self, target: str, key: str) -> None:
        self._instance = secrets.token_hex(8)
        self._metadata = [("authorization", f"Bearer {key}")]
        self._channel = grpc.insecure_channel(target)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        model = Model(name="scripted", accepts_any_reference=True)
        self._stub.PublishModel(pb.PublishModelRequest(model=model), metadata=self._metadata)
        self.connect()

    def connect(self, *held: pb.HeldRun) -> None:
        """Registers, with the runs that it holds; waits for a coordinator that is away.

        What it has of an earlier stream stays as it is.
        """
        self._outgoing: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        register = pb.Register(
            name="w",
            backend="mock",
            models=["scripted"],
            credits=8,
            held_runs=held,
            instance=self._instance,
        )
        self.send(pb.ConnectRequest(register=register))
        self.stream: Stream = self._stub.Connect(
            iter(self._outgoing.get, None), metadata=self._metadata, wait_for_ready=True
        )

    def upload(
        self, planned: pb.PlannedOperation, name: str, data: bytes
    ) -> Sequence[ArtifactFile]:
        chunk = FileChunk(
            name=name, data=data, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        first = pb.UploadArtifactRequest(artifact_id=planned.artifact_id, epoch=planned.epoch)
        answer = self._stub.UploadArtifact(
            iter([first, pb.UploadArtifactRequest(chunk=chunk)]),
            metadata=self._metadata,
            wait_for_ready=True,
        )
        return answer.files

    def send(self, message: pb.ConnectRequest) -> None:
        self._outgoing.put(message)

    def planned(self, count: int) -> list[pb.PlannedOperation]:
        """Waits for so many operations."""
        found: list[pb.PlannedOperation] = []
        while len(found) < count:
            found += next(self.stream).plan.operations
        return found

    def report(self, *done: pb.OperationDone) -> None:
        self.send(pb.ConnectRequest(report=pb.Report(done=done)))

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def succeeded(planned: pb.PlannedOperation, step: int) -> pb.OperationDone:
    """The outcome of an optim_step."""
    result = ops.OperationResult(optim_step=ops.OptimStepResult(step=step, applied=True))
    return pb.OperationDone(operation_id=planned.operation_id, epoch=planned.epoch, result=result)
