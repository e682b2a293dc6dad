"""A worker's outcomes are taken in by the run's order, however they come."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Sequence
from pathlib import Path

import grpc
from harness.cluster import Cluster, wait_accepted

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1 import worker_pb2_grpc
from tensafe.v1.artifacts_pb2 import Artifact, ArtifactFile
from tensafe.v1.models_pb2 import Model
from tensafe.v1.types_pb2 import FileChunk
from tensafe_client import Datum, ServiceClient

BATCH = [Datum([1, 2, 3], [2, 3, 4])]


class ScriptedWorker:
    """A worker whose every message is the test's."""

    def __init__(self, target: str, key: str) -> None:
        self._metadata = [("authorization", f"Bearer {key}")]
        self._channel = grpc.insecure_channel(target)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        model = Model(name="scripted", accepts_any_reference=True)
        self._stub.PublishModel(pb.PublishModelRequest(model=model), metadata=self._metadata)
        self.connect()

    def connect(self, *held: pb.HeldRun) -> None:
        """Registers, with the runs that it holds; waits for a coordinator that is away."""
        self._outgoing: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        register = pb.Register(
            name="w", backend="mock", models=["scripted"], credits=8, held_runs=held
        )
        self.send(pb.ConnectRequest(register=register))
        self._incoming = self._stub.Connect(
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
            found += next(self._incoming).plan.operations
        return found

    def report(self, *done: pb.OperationDone) -> None:
        self.send(pb.ConnectRequest(report=pb.Report(done=done)))

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def succeeded(planned: pb.PlannedOperation, step: int) -> pb.OperationDone:
    result = ops.OperationResult(optim_step=ops.OptimStepResult(step=step, applied=True))
    return pb.OperationDone(operation_id=planned.operation_id, epoch=planned.epoch, result=result)


def test_an_outcome_that_comes_before_its_turn_waits_for_it(tmp_path: Path):
    with Cluster(tmp_path) as cluster:
        cluster.start()
        worker = ScriptedWorker(cluster.target, cluster.worker_key)
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
            tc = client.create_training_client({"model_ref": "scripted"})
            other = client.create_training_client({"model_ref": "scripted"})
            futures = [tc.optim_step() for _ in range(3)]
            mark = other.optim_step()
            wait_accepted(client)
            mine = {one.operation_id: one for one in worker.planned(4)}
            first, second, third, marked = (
                mine[future.operation_id] for future in (*futures, mark)
            )
            worker.report(succeeded(second, 2), succeeded(third, 3), succeeded(marked, 1))
            mark.result(30)  # what came with it has been read
            assert not any(future.done() for future in futures)
            worker.report(succeeded(first, 1))
            worker.report(succeeded(second, 2), succeeded(third, 3), succeeded(third, 3))
            assert [future.result(30).step for future in futures] == [1, 2, 3]
        worker.close()


def test_a_save_goes_through_two_restarts_of_the_coordinator(tmp_path: Path):
    """One before its files are stored, one between that and its outcome."""
    with Cluster(tmp_path / "home") as cluster:
        cluster.start()
        worker = ScriptedWorker(cluster.target, cluster.worker_key)
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
            tc = client.create_training_client({"model_ref": "scripted"})
            saving = tc.save_state_async()
            [planned] = worker.planned(1)
            # Its answer comes after whatever was written before, the assignment's epoch too.
            client.create_training_client({"model_ref": "scripted"})
            restart(cluster)
            files = worker.upload(planned, "weights.bin", b"weights")
            restart(cluster)
            worker.connect(pb.HeldRun(run_id=tc.run_id, epoch=planned.epoch, last_seq=1))
            [again] = worker.planned(1)
            assert (again.operation_id, again.epoch) == (planned.operation_id, planned.epoch)
            artifact = Artifact(id=planned.artifact_id, run_id=tc.run_id, files=files)
            result = ops.OperationResult(save_state=ops.SaveStateResult(artifact=artifact))
            worker.report(
                pb.OperationDone(
                    operation_id=planned.operation_id, epoch=planned.epoch, result=result
                )
            )
            saved = saving.result(30)
            assert saved.size_bytes == len(b"weights")
            directory = client.download_artifact(saved.artifact_id, tmp_path / "saved")
            assert (directory / "weights.bin").read_bytes() == b"weights"
        worker.close()


def restart(cluster: Cluster) -> None:
    cluster.coordinator.kill()
    cluster.coordinator.start()
    cluster.coordinator.wait_ready()
