"""Updates of private runs: their outcome is told once the state right after them is on disk.

Noise on a sum is released once. If the outcome were told first and the worker then lost, a replay
would have to noise the same sum again. While the state is on its way, the executor goes on; what
the run does meanwhile is told behind the update.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from tensafe import failpoints
from tensafe.v1 import training_pb2, worker_pb2
from tensafe.wire.status import TenSafeFault
from workers.backend import Captured
from workers.disk import own_disk
from workers.failures import as_fault

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_GIVE_UP_S = 120.0
_LEAST_TRIES = 5
_DISKS = frozenset({"STORAGE_FULL", "STORAGE_UNAVAILABLE"})
_WAIT_S = 60.0


class StepTransfers(Protocol):
    """Where states after private updates go."""

    def upload_private_step(
        self, run_id: str, epoch: int, seq: int, step: int, charge_id: str, directory: Path
    ) -> str:
        """Blocks until the state is on disk; its snapshot's id.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT if it is not wanted, at this moment at least.
        """


@dataclass(frozen=True, slots=True)
class Ended:
    """An operation that was executed."""

    spec: training_pb2.OperationSpec
    planned: worker_pb2.PlannedOperation
    done: worker_pb2.OperationDone


@dataclass
class PrivateStep:
    """An update that was applied, and whose outcome waits.

    Attributes:
        update: `done.snapshot_id` is filled in when it is known.
        behind: the run's later operations that have ended.
        stored: whether its state is on disk, or never will be.
        fault: why it never will be.
        failing_since_s: on the monotonic clock, of the first of the failures that waiting for the
            coordinator does not explain; None if that explains the last one.
        failures: how many those are.
    """

    update: Ended
    captured: Captured
    behind: list[Ended] = field(default_factory=list)
    stored: threading.Event = field(default_factory=threading.Event)
    fault: TenSafeFault | None = None
    failing_since_s: float | None = None
    failures: int = 0
    pause_s: float = 0.0
    due_s: float = 0.0

    @property
    def run_id(self) -> str:
        return self.update.spec.run_id

    @property
    def all(self) -> list[Ended]:
        """The update, and what waits behind it."""
        return [self.update, *self.behind]


class PrivateSteps:
    """Stores the states after private updates on a thread of its own, in turn.

    Args:
        transfers: where they go; called from that thread.
        on_stored: called from that thread with an update whose state is on disk, or will never be,
            since it is not wanted any more or this machine has no room for it; the latter has a
            `fault` and no `snapshot_id`.
    """

    def __init__(self, transfers: StepTransfers, on_stored: Callable[[PrivateStep], None]) -> None:
        self._transfers = transfers
        self._on_stored = on_stored
        self._waiting: list[PrivateStep] = []
        # By run; read and written by the executor's thread alone.
        self._open: dict[str, PrivateStep] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tensafe-private", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends it. What waits is dropped; its charge counts as spent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # On the executor's thread.

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be told."""
        return not self._open

    def put(self, step: PrivateStep) -> None:
        """Begins to store. A run's next update comes after this one was told."""
        self._open[step.run_id] = step
        with self._changed:
            self._waiting.append(step)
            self._changed.notify_all()

    def open_step(self, run_id: str) -> PrivateStep | None:
        """The run's update that is not told yet."""
        return self._open.get(run_id)

    def wait_stored(self, run_id: str) -> None:
        """Waits until the state after the run's last update is on disk.

        Raises:
            TenSafeFault: STORAGE_UNAVAILABLE.
        """
        step = self._open.get(run_id)
        if step is not None and not step.stored.wait(_WAIT_S):
            raise TenSafeFault(
                "STORAGE_UNAVAILABLE",
                f"the state of {run_id} after its last private step is not on disk yet; try again",
                run_id=run_id,
            )

    def take(self, step: PrivateStep) -> bool:
        """Ends an update's wait; False if its run was forgotten meanwhile."""
        if self._open.get(step.run_id) is not step:
            return False
        del self._open[step.run_id]
        return True

    def forget(self, run_id: str) -> PrivateStep | None:
        """The run is no longer this worker's: nobody waits for what it has done. Gives back what
        was not told."""
        with self._changed:
            self._waiting = [step for step in self._waiting if step.run_id != run_id]
        return self._open.pop(run_id, None)

    # On its own thread.

    def _work(self) -> None:
        while (step := self._next()) is not None:
            try:
                with own_disk(), tempfile.TemporaryDirectory(prefix="tensafe-private-") as name:
                    directory = Path(name)
                    step.captured.write(directory)
                    failpoints.hit("mid-private-step")
                    own = step.update
                    own.done.snapshot_id = self._transfers.upload_private_step(
                        *(step.run_id, own.planned.epoch, own.spec.seq, step.captured.step),
                        *(own.planned.charge.id, directory),
                    )
            except Exception as error:
                if self._closing:
                    return
                if self._again(step, error):
                    continue
                step.fault = _unstored(step, error)
            step.stored.set()
            self._on_stored(step)

    def _next(self) -> PrivateStep | None:
        """The step that is due, when there is one; None at the end."""
        with self._changed:
            while not self._closing:
                due = min(self._waiting, key=lambda step: step.due_s, default=None)
                pause_s = None if due is None else due.due_s - time.monotonic()
                if due is not None and pause_s is not None and pause_s <= 0:
                    self._waiting.remove(due)
                    return due
                self._changed.wait(pause_s)
            return None

    def _again(self, step: PrivateStep, error: Exception) -> bool:
        """Whether it is worth another try. A coordinator that is away, or whose disk is, is waited
        for: nobody could store it meanwhile. A refusal, or a failure of this machine's, may be one
        of a moment; but another worker can make the update, if it is not."""
        seq = step.update.spec.seq
        log.warning("state of %s after seq %d is not stored: %r", step.run_id, seq, error)
        now_s = time.monotonic()
        if _is_the_coordinators(error):
            step.failing_since_s, step.failures = None, 0
        else:
            if step.failing_since_s is None:
                step.failing_since_s = now_s
            step.failures += 1
            # Both: one try may take minutes.
            if now_s - step.failing_since_s >= _GIVE_UP_S and step.failures >= _LEAST_TRIES:
                return False
        step.pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * step.pause_s))
        step.due_s = now_s + step.pause_s
        with self._changed:
            self._waiting.append(step)
        return True


def _unstored(step: PrivateStep, error: Exception) -> TenSafeFault:
    detail = as_fault(error, f"storing the state of {step.run_id}").detail
    # That an assignment is stale is no operation's failure.
    reason = "INTERNAL" if detail.reason == "STALE_ASSIGNMENT" else detail.reason
    text = f"the state of {step.run_id} after a private step could not be stored: {detail.message}"
    return TenSafeFault(reason, text, run_id=step.run_id)


def _is_the_coordinators(error: Exception) -> bool:
    if isinstance(error, TenSafeFault):
        return error.detail.reason in _DISKS
    return isinstance(error, grpc.aio.AioRpcError)
