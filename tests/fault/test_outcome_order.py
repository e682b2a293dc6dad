"""A worker's outcomes are taken in by the run's order, however they come."""

from __future__ import annotations

import queue
from pathlib import Path

import grpc
from harness.cluster import Cluster, wait_accepted

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1 import worker_pb2_grpc
from tensafe.v1.models_pb2 import Model
from tensafe_client import Datum, ServiceClient

BATCH = [Datum([1, 2, 3], [2, 3, 4])]


class ScriptedWorker:
    """A worker whose every message is the test's."""

    def __init__(self, target: str, key: str) -> None:
        self._outgoing: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        metadata = [("authorization", f"Bearer {key}")]
        self._channel = grpc.insecure_channel(target)
        stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        model = Model(name="scripted", accepts_any_reference=True)
        stub.PublishModel(pb.PublishModelRequest(model=model), metadata=metadata)
        register = pb.Register(name="w", backend="mock", models=["scripted"], credits=8)
        self.send(pb.ConnectRequest(register=register))
        self._incoming = stub.Connect(iter(self._outgoing.get, None), metadata=metadata)

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
