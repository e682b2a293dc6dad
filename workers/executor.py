"""One thread that executes planned operations in order and keeps their outcomes for the link.

The link (an event loop) submits plans, cancels and collects; the backend is called from the
executor's thread alone. Between the two lie a queue, a deque and a dict, whose single operations
are atomic, so that neither side ever waits for a lock.
"""

from __future__ import annotations

import logging
import queue
import secrets
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tensafe import failpoints
from tensafe.v1 import operations_pb2, training_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault, to_status
from workers import wire
from workers.artifacts import ArtifactCache, Transfers, artifact_message
from workers.backend import Backend
from workers.operations import ArtifactWeights, SampleRequest

log = logging.getLogger(__name__)

_Key = tuple[str, int]
_REPLAY_SKIPS = frozenset({"sample", "forward", "save_state"})


@dataclass(slots=True)
class _HeldRun:
    epoch: int
    model_ref: str
    last_seq: int = 0
    fault: TenSafeFault | None = None


@dataclass(slots=True)
class _Release:
    run_id: str


class Executor:
    """Executes plans on one backend.

    Args:
        backend: what does the work.
        transfers: where artifacts come from and go to; called from the executor's thread.
        on_progress: called from the executor's thread whenever `collect` would have news, or
            `idle` has become true.
    """

    def __init__(
        self, backend: Backend, transfers: Transfers, on_progress: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._transfers = transfers
        self._artifacts = ArtifactCache(transfers)
        self._on_progress = on_progress
        self._inbox: queue.SimpleQueue[worker_pb2.Plan | _Release | None] = queue.SimpleQueue()
        self._closing = False
        self._submitted = 0
        self._finished = 0
        # Claimed (popped) by the executor to run, or by a cancel: whoever pops it owns it.
        self._waiting: dict[_Key, worker_pb2.PlannedOperation] = {}
        self._cancelled: set[_Key] = set()
        self._done: deque[worker_pb2.OperationDone] = deque()
        self._running: worker_pb2.PlannedOperation | None = None
        self._reported: worker_pb2.PlannedOperation | None = None
        self._recent: OrderedDict[str, worker_pb2.OperationDone] = OrderedDict()
        self._runs: dict[str, _HeldRun] = {}
        self._thread = threading.Thread(target=self._work, name="tensafe-executor", daemon=True)

    # Called by the link.

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the operation at hand, and waits for it. What is still queued is
        dropped: wait for `idle` first where that matters."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()
        self._artifacts.close()

    @property
    def idle(self) -> bool:
        """Whether everything that was submitted has been executed."""
        return self._submitted == self._finished

    def held_runs(self) -> list[worker_pb2.HeldRun]:
        """The runs held and how far each is."""
        return [
            worker_pb2.HeldRun(run_id=run_id, epoch=run.epoch, last_seq=run.last_seq)
            for run_id, run in list(self._runs.items())
            if run.fault is None
        ]

    def submit(self, plan: worker_pb2.Plan) -> None:
        """Queues a plan."""
        waiting = self._waiting
        for planned in plan.operations:
            if not (planned.replay or planned.void):
                waiting[_key(planned)] = planned
        self._submitted += 1
        self._inbox.put(plan)

    def cancel(self, operation_id: str) -> None:
        """Takes back an operation that has not started; one that has runs to its end."""
        for key in list(self._waiting):
            if key[0] == operation_id:
                self._cancel(key)

    def _cancel(self, key: _Key) -> None:
        planned = self._waiting.pop(key, None)
        if planned is None:
            return
        self._cancelled.add(key)
        self._done.append(
            worker_pb2.OperationDone(
                operation_id=planned.operation_id, epoch=planned.epoch, cancelled=True
            )
        )
        self._on_progress()

    def release(self, run_id: str) -> None:
        """Forgets a run when what was planned before is done."""
        self._submitted += 1
        self._inbox.put(_Release(run_id))

    def collect(self) -> tuple[list[worker_pb2.OperationStarted], list[worker_pb2.OperationDone]]:
        """Takes what happened since the last call: operations that began and still run, and
        operations that ended."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        running = self._running
        if running is None or running is self._reported or self._backend.instant:
            return [], done
        if done and done[-1].operation_id == running.operation_id:
            return [], done
        self._reported = running
        started = worker_pb2.OperationStarted(
            operation_id=running.operation_id, epoch=running.epoch
        )
        return [started], done

    # On the executor's thread.

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            if self._closing:
                continue
            if isinstance(item, _Release):
                self._backend.close_run(item.run_id)
                self._runs.pop(item.run_id, None)
            else:
                self._take_on(item.runs)
                for planned in item.operations:
                    if self._closing:
                        break
                    self._operation(planned)
            self._finished += 1
            self._on_progress()

    def _take_on(self, assignments: Iterable[worker_pb2.RunAssignment]) -> None:
        for assignment in assignments:
            held = self._runs.get(assignment.run_id)
            if held is not None and held.epoch == assignment.epoch and held.fault is None:
                continue
            run = _HeldRun(assignment.epoch, assignment.config.model_ref)
            self._runs[assignment.run_id] = run
            try:
                state = None
                if assignment.artifact_id:
                    state = self._artifacts.directory(assignment.artifact_id)
                settings = wire.run_settings(assignment.config)
                self._backend.open_run(assignment.run_id, settings, state)
            except Exception as error:
                # The run's operations fail with this; the worker and its other runs go on.
                self._backend.close_run(assignment.run_id)
                run.fault = _as_fault(error, f"taking on run {assignment.run_id}")

    def _operation(self, planned: worker_pb2.PlannedOperation) -> None:
        operation_id = planned.operation_id
        silent = planned.replay or planned.void
        if not silent:
            claimed = self._waiting.pop(_key(planned), None)
            answered = self._recent.get(operation_id)
            if answered is not None and answered.epoch == planned.epoch:
                # Sent again after a broken stream: the answer may have been lost.
                self._done.append(answered)
                return
            if claimed is None:
                self._cancelled.discard(_key(planned))
                self._void(planned)
                return
        if planned.void:
            self._void(planned)
            return
        if not silent:
            self._running = planned
            if not self._backend.instant:
                self._on_progress()
        done = worker_pb2.OperationDone(operation_id=operation_id, epoch=planned.epoch)
        begin = time.perf_counter()
        try:
            self._execute(planned, done)
        except Exception as error:
            fault = _as_fault(error, f"operation {operation_id}")
            done.error.CopyFrom(to_status(fault.detail))
        done.compute_ms = (time.perf_counter() - begin) * 1e3
        if planned.replay:
            if done.HasField("error"):
                log.error("replay of %s failed: %s", operation_id, done.error.message)
                self._done.append(done)
            return
        self._recent[operation_id] = done
        if len(self._recent) > 2 * self._backend.credits:
            self._recent.popitem(last=False)
        self._done.append(done)
        self._running = None
        if not self._backend.instant:
            self._on_progress()

    def _void(self, planned: worker_pb2.PlannedOperation) -> None:
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        run = self._runs.get(spec.run_id)
        if run is None or run.epoch != planned.epoch or run.fault is not None:
            return
        if spec.HasField("forward_backward"):
            self._backend.poison(spec.run_id)
        run.last_seq = max(run.last_seq, spec.seq)

    def _execute(
        self, planned: worker_pb2.PlannedOperation, done: worker_pb2.OperationDone
    ) -> None:
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        kind = spec.WhichOneof("operation")
        if not spec.HasField("seq"):
            # Fills in `done.result`; an operation without seq is a SAMPLE.
            done.result.CopyFrom(self._sample(spec, planned))
            return
        run = self._runs.get(spec.run_id)
        if run is None or run.epoch != planned.epoch:
            raise RuntimeError(f"run {spec.run_id} is not held under epoch {planned.epoch}")
        if run.fault is not None:
            raise run.fault
        if spec.seq <= run.last_seq:
            raise RuntimeError(f"seq {spec.seq} of {spec.run_id} comes after {run.last_seq}")
        try:
            if not (planned.replay and kind in _REPLAY_SKIPS):
                self._numbered(kind or "", spec, planned, done)
        finally:
            run.last_seq = spec.seq

    def _numbered(
        self,
        kind: str,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> None:
        backend, run_id = self._backend, spec.run_id
        if kind == "forward_backward":
            try:
                request = wire.loss_request(spec.forward_backward)
            except TenSafeFault:
                backend.poison(run_id)
                raise
            loss = backend.forward_backward(run_id, spec.seq, request)
            failpoints.hit("mid-step")
            done.result.CopyFrom(wire.forward_backward_result(loss))
        elif kind == "optim_step":
            step = backend.optim_step(run_id, wire.step_request(spec.optim_step))
            failpoints.hit("mid-step")
            done.result.CopyFrom(wire.optim_step_result(step))
            if step.applied:
                done.step_metrics.extend(wire.step_metrics(step))
        elif kind == "forward":
            loss = backend.forward(run_id, wire.loss_request(spec.forward))
            done.result.CopyFrom(wire.forward_result(loss))
        elif kind == "sample":
            done.result.CopyFrom(self._sample(spec, planned))
        elif kind == "save_state":
            done.result.CopyFrom(self._save(spec, planned))
        elif kind == "load_state":
            done.result.CopyFrom(self._load(spec))
        else:
            raise RuntimeError("the operation has no kind")

    def _sample(
        self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation
    ) -> operations_pb2.OperationResult:
        sample = spec.sample
        source = sample.weights.WhichOneof("source") or "current"
        request = SampleRequest(
            prompts=wire.prompts(sample),
            params=wire.sampling_params(sample.params),
            run_id=spec.run_id if source == "current" else None,
            model_ref=planned.model_ref or sample.weights.base_model,
        )
        if source in ("version", "artifact_id"):
            artifact_id = planned.artifact_id or sample.weights.artifact_id
            request.artifact = ArtifactWeights(artifact_id, self._artifacts.directory(artifact_id))
        key = spec.seq if source == "current" else planned.operation_id
        return wire.sample_result(self._backend.sample(key, request))

    def _save(
        self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation
    ) -> operations_pb2.OperationResult:
        message = spec.save_state
        complete = message.include_optimizer if message.HasField("include_optimizer") else True
        with tempfile.TemporaryDirectory(prefix="tensafe-save-") as name:
            directory = Path(name)
            outcome = self._backend.save_state(spec.run_id, directory, complete)
            files = self._transfers.upload(planned.artifact_id, directory)
        artifact = artifact_message(planned.artifact_id, spec.run_id, outcome, complete, files)
        return operations_pb2.OperationResult(
            save_state=operations_pb2.SaveStateResult(artifact=artifact)
        )

    def _load(self, spec: training_pb2.OperationSpec) -> operations_pb2.OperationResult:
        message = spec.load_state
        include = message.include_optimizer if message.HasField("include_optimizer") else None
        directory = self._artifacts.directory(message.artifact_id)
        outcome = self._backend.load_state(spec.run_id, directory, include)
        return wire.load_state_result(message.artifact_id, outcome)


def _key(planned: worker_pb2.PlannedOperation) -> _Key:
    # The epoch too: after a new assignment the same operation may come again behind the old one.
    return planned.operation_id, planned.epoch


def _as_fault(error: Exception, what: str) -> TenSafeFault:
    """A known fault as it is; anything else as INTERNAL, its text for the log only."""
    if isinstance(error, TenSafeFault):
        return error
    error_id = secrets.token_hex(6)
    log.error("%s failed, error id %s", what, error_id, exc_info=error)
    return TenSafeFault(
        "INTERNAL",
        f"the worker failed for a reason of its own, error id {error_id}; tell the operator, "
        "whose log has the details",
        error_id=error_id,
    )
