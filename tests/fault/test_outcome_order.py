"""A worker's outcomes are taken in by the run's order, however they come."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from harness.cluster import Cluster, wait_accepted
from harness.scripted_worker import ScriptedWorker, succeeded

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe_client import ServiceClient


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
            worker.connect(held(tc.run_id, planned))
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


def test_a_worker_that_comes_back_over_a_new_stream_keeps_its_runs(tmp_path: Path):
    """It noticed before the coordinator that the old one was cut."""
    with Cluster(tmp_path) as cluster:
        cluster.start()
        worker = ScriptedWorker(cluster.target, cluster.worker_key)
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
            tc = client.create_training_client({"model_ref": "scripted"})
            futures = [tc.optim_step() for _ in range(2)]
            first, second = worker.planned(2)
            worker.report(succeeded(first, 1))
            futures[0].result(30)
            old = worker.stream
            worker.connect(held(tc.run_id, first, second))
            [again] = worker.planned(1)
            assert (again.operation_id, again.epoch) == (second.operation_id, second.epoch)
            with pytest.raises(grpc.RpcError, match="has come back over another stream"):
                list(old)
            worker.report(succeeded(second, 2))
            assert futures[1].result(30).step == 2
            assert "restoring" not in cluster.coordinator.log
        worker.close()


def held(run_id: str, *planned: pb.PlannedOperation) -> pb.HeldRun:
    """A run of which a worker has executed the first operation, and was sent all of these."""
    ids = [one.operation_id for one in planned]
    return pb.HeldRun(run_id=run_id, epoch=planned[0].epoch, last_seq=1, operation_ids=ids)


def restart(cluster: Cluster) -> None:
    cluster.coordinator.kill()
    cluster.coordinator.start()
    cluster.coordinator.wait_ready()


def test_a_sample_runs_from_its_first_token_on(tmp_path: Path):
    """Its worker drew it between telling what began and telling what was drawn."""
    with Cluster(tmp_path) as cluster:
        cluster.start()
        worker = ScriptedWorker(cluster.target, cluster.worker_key)
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("t")) as client:
            tc = client.create_training_client({"model_ref": "scripted"})
            stream = tc.sample("x", stream=True)
            [planned] = worker.planned(1)
            drawn = pb.SampleChunk(
                operation_id=planned.operation_id,
                epoch=planned.epoch,
                chunk=ops.TokenChunk(text="a"),
            )
            worker.send(pb.ConnectRequest(report=pb.Report(chunks=[drawn])))
            assert next(stream).text == "a"
            assert client.operation(planned.operation_id).state == "running"
        worker.close()
