"""What the executor knows of the runs that it was given, and when each of them gets a snapshot."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tensafe.v1 import training_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault
from workers.backend import Backend
from workers.snapshots import Debt, Snapshot, SnapshotPolicy, Snapshotter, SnapshotTransfers

log = logging.getLogger(__name__)

_UNKEPT_PAUSE_S = 5.0
_CHANGES_STATE = frozenset({"forward_backward", "optim_step", "load_state"})


@dataclass(slots=True)
class HeldRun:
    """A run that was assigned.

    Attributes:
        check: it serves a comparison with the log only.
        deterministic: its gradients are computed alone.
        private: its recovery points are made with its updates, and at no other time.
        fault: why it could not be taken on; its operations fail with this.
        refused: its snapshot could not be loaded; its operations are left to its next assignment.
        debt: what a replay from its newest snapshot would take.
        no_snapshot_before_s: on the monotonic clock; one was not kept a moment ago.
    """

    epoch: int
    model_ref: str
    last_seq: int = 0
    check: bool = False
    deterministic: bool = False
    private: bool = False
    fault: TenSafeFault | None = None
    refused: bool = False
    debt: Debt = field(default_factory=Debt)
    no_snapshot_before_s: float = 0.0

    @property
    def is_held(self) -> bool:
        """Whether its state is here, for its own sake."""
        return self.fault is None and not (self.check or self.refused)


class SnapshotKeeper:
    """Captures runs between two operations, on the executor's thread; between two, a run's state is
    that of its last seq.

    Attributes:
        policy: when runs get snapshots; never, until the coordinator has said.
    """

    def __init__(
        self, backend: Backend, runs: Mapping[str, HeldRun], transfers: SnapshotTransfers
    ) -> None:
        self._backend = backend
        self._runs = runs
        self._unkept: deque[Snapshot] = deque()
        self._snapshotter = Snapshotter(transfers, self._unkept.append)
        self.policy = SnapshotPolicy()

    def start(self) -> None:
        """Starts the thread that stores."""
        self._snapshotter.start()

    def close(self) -> None:
        """Ends it."""
        self._snapshotter.close()

    def after(
        self,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> None:
        """Counts what a replay would have to do, and makes a snapshot when it is due."""
        run_id = planned.run_id or spec.run_id
        run = self._runs.get(run_id)
        if run is None or run.epoch != planned.epoch or not run.is_held or run.private:
            return
        self._count_unkept()
        if spec.WhichOneof("operation") in _CHANGES_STATE:
            run.debt.add(len(planned.spec), done.compute_ms / 1e3)
        elif done.result.save_state.artifact.has_optimizer:
            run.debt = Debt()  # a replay begins at this artifact
        if done.result.optim_step.applied:
            run.debt.steps += 1
            rested = time.monotonic() >= run.no_snapshot_before_s
            if rested and self.policy.due(run.debt):
                self._make(run_id, run)

    def flush(self) -> None:
        """Makes a snapshot of every run that has moved since its last one."""
        if self.policy == SnapshotPolicy():
            return
        self._count_unkept()
        for run_id, run in self._runs.items():
            if run.debt.operations and run.is_held:
                self._make(run_id, run)

    def forget(self, run_id: str) -> None:
        """Drops what waits of a run that is gone."""
        self._snapshotter.forget(run_id)

    def wait_stored(self, timeout_s: float) -> bool:
        """Waits until all that was made is stored or refused; False if that took longer."""
        return self._snapshotter.wait_idle(timeout_s)

    def _make(self, run_id: str, run: HeldRun) -> None:
        try:
            captured = self._backend.capture(run_id)
        except Exception:
            # Training goes on; the log has everything.
            log.exception("no snapshot of %s", run_id)
            run.no_snapshot_before_s = time.monotonic() + _UNKEPT_PAUSE_S
            return
        self._snapshotter.put(Snapshot(run_id, run.epoch, run.last_seq, captured, run.debt))
        run.debt = Debt()

    def _count_unkept(self) -> None:
        while self._unkept:
            unkept = self._unkept.popleft()
            owner = self._runs.get(unkept.run_id)
            if owner is not None and owner.epoch == unkept.epoch:
                owner.debt = owner.debt.plus(unkept.debt)
                owner.no_snapshot_before_s = time.monotonic() + _UNKEPT_PAUSE_S
