"""One thread that executes planned operations in order and keeps their outcomes for the link.

The link (an event loop) submits plans, cancels and collects; the backend is called from the
executor's thread alone. Between the two lie a queue, a deque and a dict, whose single operations
are atomic, so that neither side ever waits for a lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tensafe.v1 import training_pb2, worker_pb2
from tensafe.wire.status import to_status
from workers import wire
from workers.artifacts import ArtifactCache, Transfers
from workers.backend import Backend
from workers.execution import Execution, SnapshotLoadError, as_fault
from workers.keeping import HeldRun, SnapshotKeeper
from workers.watchdog import Activity, OperationLimits

log = logging.getLogger(__name__)

_Key = tuple[str, int]
_REPLAY_SKIPS = frozenset({"sample", "forward", "save_state"})
_FAREWELL_S = 20.0


@dataclass(slots=True)
class _Release:
    run_id: str


@dataclass(slots=True)
class _Flush:
    captured: threading.Event


class _Farewell:
    """The last thing to do before the worker leaves."""


class Executor:
    """Executes plans on one backend.

    Args:
        backend: what does the work.
        transfers: where artifacts come from and go to; called from the executor's thread.
        on_progress: called from the executor's thread whenever `collect` would have news, or
            `idle` has become true.
        limits: how long an operation may run, for whoever watches `activity`.

    Attributes:
        activity: what the thread is at.
        snapshots: what makes them, and when.
    """

    def __init__(
        self,
        backend: Backend,
        transfers: Transfers,
        on_progress: Callable[[], None],
        limits: OperationLimits | None = None,
    ) -> None:
        self.activity = Activity()
        self._limits = limits or OperationLimits()
        self._leaving = False
        self._backend = backend
        self._transfers = transfers
        self._artifacts = ArtifactCache(transfers)
        self._execution = Execution(backend, transfers, self._artifacts)
        self._on_progress = on_progress
        self._inbox: queue.SimpleQueue[worker_pb2.Plan | _Release | _Flush | _Farewell | None] = (
            queue.SimpleQueue()
        )
        self._closing = False
        self._submitted = 0
        self._finished = 0
        # Claimed (popped) by the executor to run, or by a cancel: whoever pops it owns it.
        self._waiting: dict[_Key, worker_pb2.PlannedOperation] = {}
        self._cancelled: set[_Key] = set()
        self._done: deque[worker_pb2.OperationDone] = deque()
        self._refused: deque[worker_pb2.RefusedSnapshot] = deque()
        self._running: worker_pb2.PlannedOperation | None = None
        self._reported: worker_pb2.PlannedOperation | None = None
        self._recent: OrderedDict[str, worker_pb2.OperationDone] = OrderedDict()
        self._runs: dict[str, HeldRun] = {}
        self.snapshots = SnapshotKeeper(backend, self._runs, transfers)
        self._thread = threading.Thread(target=self._work, name="tensafe-executor", daemon=True)

    # Called by the link.

    def start(self) -> None:
        """Starts the threads."""
        self.snapshots.start()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the operation at hand, and waits for it. What is still queued is
        dropped: wait for `idle` first where that matters."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()
        self.snapshots.close()
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
            if run.is_held
        ]

    def submit(self, plan: worker_pb2.Plan) -> None:
        """Queues a plan."""
        waiting = self._waiting
        for planned in plan.operations:
            if not (planned.replay or planned.void):
                waiting[_key(planned)] = planned
        self._submitted += 1
        self._inbox.put(plan)
        if any(self._runs_already(_key(planned)) for planned in plan.operations):
            # Sent again over a new stream, which is to know that it runs.
            self._reported = None
            self._on_progress()

    def _runs_already(self, key: _Key) -> bool:
        running = self._running
        return running is not None and _key(running) == key

    def cancel(self, operation_id: str) -> None:
        """Takes back an operation that has not started; one that has runs to its end."""
        for key in list(self._waiting):
            if key[0] == operation_id:
                self._cancel(key)

    def _cancel(self, key: _Key) -> None:
        answered = self._recent.get(key[0])
        if self._runs_already(key) or (answered is not None and answered.epoch == key[1]):
            return  # it was sent again over a new stream, and has begun already
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

    def flush_snapshots(self, timeout_s: float) -> bool:
        """Makes a snapshot of every run that has moved since its last one, after what was planned,
        and waits until they are stored; False if that took longer. Blocks."""
        flush = _Flush(threading.Event())
        deadline = time.monotonic() + timeout_s
        self._submitted += 1
        self._inbox.put(flush)
        if not flush.captured.wait(timeout_s):
            return False
        return self.snapshots.wait_stored(max(0.0, deadline - time.monotonic()))

    def collect_refused(self) -> list[worker_pb2.RefusedSnapshot]:
        """Takes the snapshots that could not be loaded since the last call."""
        refused = []
        while self._refused:
            refused.append(self._refused.popleft())
        return refused

    def leave(self) -> None:
        """Begins nothing more: `idle` becomes true when the operation at hand has ended and the
        runs' snapshots are stored. What has not begun is the coordinator's to give away."""
        self._leaving = True
        self._submitted += 1
        self._inbox.put(_Farewell())

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
            if isinstance(item, _Farewell):
                self._farewell()
            elif self._leaving:
                pass
            elif isinstance(item, _Release):
                self._backend.close_run(item.run_id)
                self._runs.pop(item.run_id, None)
                self.snapshots.forget(item.run_id)
            elif isinstance(item, _Flush):
                self.snapshots.flush()
                item.captured.set()
            else:
                self._take_on(item.runs)
                for planned in item.operations:
                    if self._closing or self._leaving:
                        break
                    self._operation(planned)
                    self.activity.end()
            self._finished += 1
            self._on_progress()

    def _take_on(self, assignments: Iterable[worker_pb2.RunAssignment]) -> None:
        for assignment in assignments:
            held = self._runs.get(assignment.run_id)
            if held is not None and held.epoch == assignment.epoch and held.fault is None:
                continue
            run = HeldRun(
                assignment.epoch,
                assignment.config.model_ref,
                last_seq=assignment.seq,
                check=assignment.check,
            )
            self._runs[assignment.run_id] = run
            self.activity.begin("", assignment.run_id, self._limits.base_s)
            try:
                settings = wire.run_settings(assignment.config)
                if assignment.snapshot_id:
                    self._execution.open_from_snapshot(assignment, settings)
                    continue
                state = None
                if assignment.artifact_id:
                    state = self._artifacts.directory(assignment.artifact_id)
                self._backend.open_run(assignment.run_id, settings, state)
            except SnapshotLoadError as error:
                self._backend.close_run(assignment.run_id)
                run.refused = True
                self._refused.append(error.refused)
                self._on_progress()
            except Exception as error:
                # The run's operations fail with this; the worker and its other runs go on.
                self._backend.close_run(assignment.run_id)
                run.fault = as_fault(error, f"taking on run {assignment.run_id}")
            finally:
                self.activity.end()

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
        spec = training_pb2.OperationSpec()
        begin = time.perf_counter()
        try:
            spec.ParseFromString(planned.spec)
            self._execute(spec, planned, done)
        except _RefusedRunError:
            self._running = None
            return
        except Exception as error:
            fault = as_fault(error, f"operation {operation_id}")
            done.error.CopyFrom(to_status(fault.detail))
        done.compute_ms = (time.perf_counter() - begin) * 1e3
        if planned.replay:
            done.replay = True
            done.run_id = planned.run_id or spec.run_id
            if done.WhichOneof("outcome"):  # some kinds change nothing and are passed over
                self._done.append(done)
                self._on_progress()
            self.snapshots.after(spec, planned, done)
            return
        self._recent[operation_id] = done
        if len(self._recent) > 2 * self._backend.credits:
            self._recent.popitem(last=False)
        self._done.append(done)
        self._running = None
        if not self._backend.instant:
            self._on_progress()
        self.snapshots.after(spec, planned, done)

    def _void(self, planned: worker_pb2.PlannedOperation) -> None:
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        run_id = planned.run_id or spec.run_id
        run = self._runs.get(run_id)
        if run is None or run.epoch != planned.epoch or run.fault is not None or run.refused:
            return
        if spec.HasField("forward_backward"):
            self._backend.poison(run_id)
        run.last_seq = max(run.last_seq, spec.seq)

    def _execute(
        self,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> None:
        kind = spec.WhichOneof("operation")
        self.activity.begin(planned.operation_id, spec.run_id, self._limits.of(spec))
        if not spec.HasField("seq"):
            # Fills in `done.result`; an operation without seq is a SAMPLE.
            done.result.CopyFrom(self._execution.sample(spec, planned))
            return
        run_id = planned.run_id or spec.run_id
        run = self._runs.get(run_id)
        if run is None or run.epoch != planned.epoch:
            raise RuntimeError(f"run {run_id} is not held under epoch {planned.epoch}")
        if run.refused:
            raise _RefusedRunError
        if run.fault is not None:
            raise run.fault
        if spec.seq <= run.last_seq:
            raise RuntimeError(f"seq {spec.seq} of {run_id} comes after {run.last_seq}")
        try:
            if not (planned.replay and kind in _REPLAY_SKIPS):
                self._execution.numbered(kind or "", run_id, spec, planned, done)
        finally:
            run.last_seq = spec.seq

    def _farewell(self) -> None:
        self.snapshots.flush()
        if not self.snapshots.wait_stored(_FAREWELL_S):
            log.warning("not all snapshots were stored before leaving; more is to be replayed")


class _RefusedRunError(Exception):
    """The operation belongs to a run whose snapshot was refused."""


def _key(planned: worker_pb2.PlannedOperation) -> _Key:
    # The epoch too: after a new assignment the same operation may come again behind the old one.
    return planned.operation_id, planned.epoch
