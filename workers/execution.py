"""What each kind of operation asks of the backend, and what its answer is on the wire."""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc

from tensafe import failpoints
from tensafe.v1 import operations_pb2, training_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault, to_status
from workers import wire
from workers.artifacts import ArtifactCache, Transfers, artifact_message
from workers.backend import Backend
from workers.disk import own_disk
from workers.failures import USELESS, RunLostError, applied, closed_over
from workers.operations import ArtifactWeights, RunSettings, SampleRequest, StepOutcome
from workers.outcome_size import check_size

log = logging.getLogger(__name__)

_CHANGES_WINDOW = frozenset({"forward_backward", "optim_step", "private_step"})


class SnapshotLoadError(Exception):
    """A run's snapshot could not be loaded.

    Attributes:
        refused: what the coordinator is told: with DATA_LOSS if the snapshot is of no use.
    """

    def __init__(self, assignment: worker_pb2.RunAssignment, fault: TenSafeFault) -> None:
        super().__init__(str(fault))
        self.refused = worker_pb2.RefusedSnapshot(
            run_id=assignment.run_id,
            epoch=assignment.epoch,
            snapshot_id=assignment.snapshot_id,
            error=to_status(fault.detail),
        )


class Execution:
    """Operations of every kind on one backend, from the executor's thread.

    Args:
        on_tokens: called when it turns out how many tokens the operation at hand has.
    """

    def __init__(
        self,
        backend: Backend,
        transfers: Transfers,
        artifacts: ArtifactCache,
        on_tokens: Callable[[int], None],
    ) -> None:
        self._on_tokens = on_tokens
        self._backend = backend
        self._transfers = transfers
        self._artifacts = artifacts

    def open_from_snapshot(
        self, assignment: worker_pb2.RunAssignment, settings: RunSettings
    ) -> None:
        """Takes a run on as the assignment's snapshot has it.

        Raises:
            SnapshotLoadError: it is damaged or does not fit.
            TenSafeFault: the run cannot be opened for another reason.
        """
        with own_disk(), tempfile.TemporaryDirectory(prefix="tensafe-restore-") as name:
            directory = Path(name)
            try:
                self._transfers.fetch_snapshot(assignment.snapshot_id, directory)
                self._backend.open_run(assignment.run_id, settings, directory)
            except TenSafeFault as fault:
                if fault.detail.reason in USELESS:
                    raise SnapshotLoadError(assignment, _useless(assignment, fault)) from fault
                raise
            except (grpc.aio.AioRpcError, MemoryError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno != errno.ENOENT:
                    raise  # of this machine's disk; a missing file is the snapshot's
                log.exception("snapshot %s cannot be loaded", assignment.snapshot_id)
                raise SnapshotLoadError(assignment, _useless(assignment, error)) from error

    def numbered(
        self,
        kind: str,
        run_id: str,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> None:
        """Fills in what came of an operation in a run's order, applied to `run_id`. A SAMPLE is
        not among them: it goes on beside others (`workers/samples.py`).

        Raises:
            RunLostError: it failed, and the run is not as its log would have it after that.
        """
        backend = self._backend
        if kind in _CHANGES_WINDOW:
            with closed_over(backend, kind, planned, run_id):
                self._change_window(kind, run_id, spec, planned, done)
        elif kind == "forward":
            loss = backend.forward(
                run_id, wire.loss_request(spec.forward, self._artifacts.directory)
            )
            done.result.CopyFrom(wire.forward_result(loss))
            check_size(done)
        elif kind == "save_state":
            done.result.CopyFrom(self._save(spec, planned))
        elif kind == "load_state":
            done.result.CopyFrom(self._load(spec, run_id))
        else:
            raise RuntimeError("the operation has no kind")

    def _change_window(
        self,
        kind: str,
        run_id: str,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> None:
        backend = self._backend
        if kind == "forward_backward":
            request = wire.gradient_request(
                planned, spec.forward_backward, self._artifacts.directory
            )
            loss = backend.forward_backward(run_id, spec.seq, request)
            with applied(run_id):
                failpoints.hit("mid-step")
                done.result.CopyFrom(wire.forward_backward_result(loss))
                check_size(done)
            return
        if kind == "optim_step":
            step = backend.optim_step(run_id, wire.step_request(planned, spec.optim_step))
        else:
            step = self._private_step(run_id, spec, planned)
        with applied(run_id):
            failpoints.hit("mid-step")
            write_step(planned, step, done)

    def _private_step(
        self,
        run_id: str,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
    ) -> StepOutcome:
        # All of it before anything is computed: a connection may break.
        pieces = self._transfers.fetch_private_batch(planned.operation_id, planned.charge.id)
        requests = [wire.private_request(piece) for piece in pieces]
        self._on_tokens(sum(len(request.batch.input_tokens) for request in requests))
        request = wire.step_request(planned, spec.private_step)
        return self._backend.private_step(run_id, spec.seq, requests, request)

    def sample_request(
        self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation
    ) -> tuple[SampleRequest, str | int]:
        """What the sampler is asked, and what draws come from beside a seed."""
        sample = spec.sample
        source = sample.weights.WhichOneof("source") or "current"
        request = SampleRequest(
            prompts=wire.prompts(sample),
            params=wire.sampling_params(sample.params),
            run_id=spec.run_id if source == "current" else None,
            model_ref=planned.model_ref or sample.weights.base_model,
            stream=sample.stream,
        )
        if source in ("version", "artifact_id"):
            artifact_id = planned.artifact_id or sample.weights.artifact_id
            request.artifact = ArtifactWeights(artifact_id, self._artifacts.directory(artifact_id))
        return request, spec.seq if source == "current" else planned.operation_id

    def _save(
        self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation
    ) -> operations_pb2.OperationResult:
        message = spec.save_state
        complete = message.include_optimizer if message.HasField("include_optimizer") else True
        with own_disk(), tempfile.TemporaryDirectory(prefix="tensafe-save-") as name:
            directory = Path(name)
            outcome = self._backend.save_state(spec.run_id, directory, complete)
            files = self._transfers.upload(planned.artifact_id, planned.epoch, directory)
        artifact = artifact_message(planned.artifact_id, spec.run_id, outcome, complete, files)
        return operations_pb2.OperationResult(
            save_state=operations_pb2.SaveStateResult(artifact=artifact)
        )

    def _load(
        self, spec: training_pb2.OperationSpec, run_id: str
    ) -> operations_pb2.OperationResult:
        message = spec.load_state
        include = message.include_optimizer if message.HasField("include_optimizer") else None
        directory = self._artifacts.directory(message.artifact_id)
        try:
            outcome = self._backend.load_state(run_id, directory, include)
            return wire.load_state_result(message.artifact_id, outcome)
        except TenSafeFault:
            raise  # it was refused, and has changed nothing
        except Exception as error:
            raise RunLostError(run_id, error) from error


def write_step(
    planned: worker_pb2.PlannedOperation, step: StepOutcome, done: worker_pb2.OperationDone
) -> None:
    """Fills in an optim_step's or a private step's result."""
    done.result.CopyFrom(wire.optim_step_result(step))
    done.charge_unused = planned.HasField("charge") and not step.applied
    if step.applied:
        done.step_metrics.extend(wire.step_metrics(step))


def _useless(assignment: worker_pb2.RunAssignment, error: Exception) -> TenSafeFault:
    return TenSafeFault(
        "CHECKSUM_MISMATCH",
        f"snapshot {assignment.snapshot_id} of {assignment.run_id} cannot be loaded: "
        f"{type(error).__name__}",
        run_id=assignment.run_id,
    )
