"""Recovery points: when a run gets one, and the thread that takes them to the coordinator.

The executor copies the run's state in memory between two operations; everything else happens here,
beside it. Of one run one snapshot is on its way at a time, and behind it the newest waits.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tensafe import failpoints
from workers.backend import Captured

log = logging.getLogger(__name__)

# What an operation costs a replay beside its computation: reading, sending, unpacking.
_OVERHEAD_S = 0.2e-3


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """When a run gets a snapshot: as soon as one of these has come together since its last one.

    Attributes:
        steps: applied updates; 0: not by this measure.
        payload_bytes: bytes of the operations' specs; 0: not by this measure.
        replay_s: estimated time that a replay would take, s; 0: not by this measure.
    """

    steps: int = 0
    payload_bytes: int = 0
    replay_s: float = 0.0

    def due(self, debt: Debt) -> bool:
        """Whether that much is to be replayed that a snapshot is worth it."""
        return (
            (self.steps > 0 and debt.steps >= self.steps)
            or (self.payload_bytes > 0 and debt.payload_bytes >= self.payload_bytes)
            or (self.replay_s > 0 and debt.replay_s >= self.replay_s)
        )


@dataclass(slots=True)
class Debt:
    """What would have to be replayed if the worker were lost now."""

    operations: int = 0
    steps: int = 0
    payload_bytes: int = 0
    replay_s: float = 0.0

    def add(self, payload_bytes: int, compute_s: float) -> None:
        """Counts an operation that changed the run."""
        self.operations += 1
        self.payload_bytes += payload_bytes
        self.replay_s += compute_s + _OVERHEAD_S

    def plus(self, other: Debt) -> Debt:
        return Debt(
            self.operations + other.operations,
            self.steps + other.steps,
            self.payload_bytes + other.payload_bytes,
            self.replay_s + other.replay_s,
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A captured state, and where in the run's order it stands."""

    run_id: str
    epoch: int
    seq: int
    captured: Captured
    debt: Debt


class SnapshotTransfers(Protocol):
    """Where snapshots go."""

    def upload_snapshot(
        self, run_id: str, epoch: int, seq: int, step: int, directory: Path
    ) -> str | None:
        """Blocks until the coordinator has kept it (None), or has said why not."""


class Snapshotter:
    """Writes and uploads snapshots on a thread of its own.

    Args:
        transfers: where they go; called from that thread.
        on_unkept: called from that thread with one that was not kept, so that its debt counts
            again.
    """

    def __init__(self, transfers: SnapshotTransfers, on_unkept: Callable[[Snapshot], None]) -> None:
        self._transfers = transfers
        self._on_unkept = on_unkept
        self._waiting: OrderedDict[str, Snapshot] = OrderedDict()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tensafe-snapshots", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def put(self, snapshot: Snapshot) -> None:
        """Takes a snapshot in, in place of one of the same run that still waits."""
        with self._changed:
            older = self._waiting.pop(snapshot.run_id, None)
            if older is not None and older.epoch == snapshot.epoch:
                snapshot = Snapshot(
                    snapshot.run_id,
                    snapshot.epoch,
                    snapshot.seq,
                    snapshot.captured,
                    older.debt.plus(snapshot.debt),
                )
            self._waiting[snapshot.run_id] = snapshot
            self._changed.notify_all()

    def forget(self, run_id: str) -> None:
        """Drops what waits of a run that is gone."""
        with self._changed:
            self._waiting.pop(run_id, None)

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until all is stored or refused; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self) -> None:
        """Drops what waits, and ends the thread after the snapshot at hand."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                if self._closing:
                    return
                _, snapshot = self._waiting.popitem(last=False)
                self._busy = True
            self._store(snapshot)

    def _store(self, snapshot: Snapshot) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="tensafe-snapshot-") as name:
                directory = Path(name)
                snapshot.captured.write(directory)
                failpoints.hit("mid-snapshot-write")
                refusal = self._transfers.upload_snapshot(
                    snapshot.run_id,
                    snapshot.epoch,
                    snapshot.seq,
                    snapshot.captured.step,
                    directory,
                )
        except Exception as error:
            if self._closing:
                return
            # Nothing is lost: the log has all of it, and the next step tries again.
            log.warning("no snapshot of %s at seq %d: %r", snapshot.run_id, snapshot.seq, error)
            refusal = "it could not be stored"
        if refusal is not None:
            log.info("snapshot of %s not kept: %s", snapshot.run_id, refusal)
            self._on_unkept(snapshot)
