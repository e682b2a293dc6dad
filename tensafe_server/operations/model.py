"""Runs and unfinished operations, as the coordinator holds them in memory.

The store is the truth after a restart; while the coordinator lives, these are, and every change
that a caller may rely on is committed before it is told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.types_pb2 import Tensor
from tensafe.wire.status import ErrorDetail
from tensafe_server.operations.transcripts import Transcript
from tensafe_server.planning.views import Work
from tensafe_server.privacy.budgets import Charge
from tensafe_server.privacy.participation import OpenWindow
from tensafe_server.privacy.runs import PrivateRun
from tensafe_server.store.base import OperationRow, RunRow

QUEUED = ops.OPERATION_STATE_QUEUED
RUNNING = ops.OPERATION_STATE_RUNNING
SUCCEEDED = ops.OPERATION_STATE_SUCCEEDED
FAILED = ops.OPERATION_STATE_FAILED
CANCELLED = ops.OPERATION_STATE_CANCELLED


_MOST_DEATHS = 1
# A sample is generated for long, and beside everything else: it is less of a suspect.
_MOST_DEATHS_OF_A_SAMPLE = 3


class Losses:
    """Worker processes that were lost with one thing, and had not told its end.

    A crash may be faster than the word of what began. Without one, the loss weighs less: it is held
    against what the process was likely to be at.
    """

    def __init__(self, most_deaths: int = _MOST_DEATHS) -> None:
        self._most_deaths = most_deaths
        self._running: dict[str, bool] = {}

    def __len__(self) -> int:
        return len(self._running)

    @property
    def workers(self) -> Set[str]:
        """The processes."""
        return self._running.keys()

    def add(self, worker: str, *, running: bool) -> None:
        """Counts a process, once; `running`: it had said that it was at this."""
        self._running[worker] = running or self._running.get(worker, False)

    def forgive(self, worker: str) -> None:
        """The process is back."""
        self._running.pop(worker, None)

    def clear(self) -> None:
        self._running.clear()

    @property
    def too_many(self) -> bool:
        """Whether it is not to be tried again."""
        most = self._most_deaths
        return sum(self._running.values()) > most or len(self) > most + 1


@dataclass(slots=True, eq=False)
class PendingOperation:
    """An operation that has not finished, or a void one that still has its place in the order.

    Attributes:
        row: what the store has or will have.
        spec: serialized OperationSpec; None while it is only in the store.
        fetching: it is being read from the store.
        ahead: when it came, an earlier seq was missing.
        deadline_timer: the clock of its time to live.
        model: name of the base model it runs on.
        worker_id: where it was sent; None while it waits.
        void: it ended before it ran; its place only tells the worker that the window has a hole.
        stretch: the first and the last seq of the void operations next to it that it stands for;
            None if it stands for itself.
        finishing: its outcome is on the way to the disk; nothing may change it any more.
        losses: workers that were lost with it.
        attempted: the store has a record of a worker that began it, or was lost with it.
        on_trial: too many workers have not told its end, but one of them may still come back.
        withdrawn: it was cancelled, or its deadline passed, while a worker had it.
        sent_under: the assignment of its run under which a worker was last sent it, or may have
            been; 0: none.
        work: what the planner is told of it; None if that is to be found out.
        no_room_at: worker processes that had no room for it on their disks.
        ready_s: when it came, on the monotonic clock; 0 if that was before the coordinator.
        transcript: what a sample has drawn so far; None if nothing, and nobody asked.
        charge: of a private step, what it may release something under.
        units: of a private run's batch, the number of each datum's unit.
        preparing: it is being found out whether, and with what, it may be sent.
    """

    row: OperationRow
    spec: bytes | None
    model: str
    worker_id: str | None = None
    void: bool = False
    stretch: tuple[int, int] | None = None
    finishing: bool = False
    losses: Losses = field(default_factory=Losses)
    attempted: bool = False
    on_trial: bool = False
    withdrawn: ErrorDetail | None = None
    sent_under: int = 0
    fetching: bool = False
    ahead: bool = False
    deadline_timer: asyncio.TimerHandle | None = None
    work: Work | None = None
    no_room_at: set[str] = field(default_factory=set)
    ready_s: float = 0.0
    transcript: Transcript | None = None
    charge: Charge | None = None
    units: Tensor | None = None
    preparing: bool = False
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)
    _started: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.is_sample:
            self.losses = Losses(_MOST_DEATHS_OF_A_SAMPLE)

    @property
    def spec_bytes(self) -> int:
        return self.row.spec_bytes

    @property
    def seqs(self) -> tuple[int, int]:
        """The first and the last seq that it stands for in its run's order."""
        return self.stretch or (self.row.seq or 0, self.row.seq or 0)

    @property
    def is_sample(self) -> bool:
        """Whether it only begins in its run's order: what follows may end before it."""
        return self.row.kind == ops.OPERATION_KIND_SAMPLE

    def take_tokens(self, chunk: ops.TokenChunk) -> None:
        """Adds what a sample has drawn."""
        if self.transcript is None:
            self.transcript = Transcript()
        self.transcript.take(chunk)

    def wait_finished(self) -> asyncio.Future[None]:
        """Resolves when the outcome is on disk."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        return future

    def wait_started(self) -> asyncio.Future[None]:
        """Resolves when the operation runs or has finished."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started.append(future)
        return future

    def stop_deadline(self) -> None:
        """No deadline ends it any more."""
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
            self.deadline_timer = None

    def notify_started(self) -> None:
        _resolve(self._started)

    def notify_finished(self) -> None:
        _resolve(self._started)
        _resolve(self._waiters)


@dataclass(slots=True, eq=False)
class RunState:
    """A run: its order, and which worker holds its adapter.

    Attributes:
        next_seq: the lowest seq that has not been accepted yet.
        early: operations that came before an earlier seq did.
        queue: operations in order that no worker has.
        new_voids: how many operations became void since those in the queue were merged.
        in_flight: operations in order that the run's worker has. A SAMPLE may stay here while later
            ones end.
        by_seq: unfinished operations, to answer retries.
        worker_id: the worker that holds the run's state; None if none does.
        epoch: number of the newest assignment to a worker.
        epochs_unwritten: assignments that a coordinator which was killed may have made without
            writing their epochs down; the next one lies beyond them.
        executed_seq: the last seq that a worker has executed and reported.
        gap_timer, gap_seq: the clock that runs while a seq is missing, and that seq.
        pruned_seq: the specs of operations up to here are gone from the log.
        snapshot_seq: the last operation in the newest snapshot; 0 if there is none.
        useless_snapshots: of snapshots that are whole and could not be loaded, by id, the worker
            processes that could not.
        passed_over: ids of those of which a part was missing or unreadable when last looked at.
        pruning: held while something of the run's past is chosen or taken away.
        pinned: how many are reading its past, of which nothing may go meanwhile.
        replay_mismatches: replayed operations whose results were not those in the log.
        arriving: its state was brought to its worker, which has not begun with what is new.
        losses, attempted, on_trial: of bringing it, as of an operation.
        given_up: the worker processes, one after the other, that did not bring it to where the log
            has it, since it last went on.
        resting: it was given up a moment ago, and goes to no worker just now.
        window_queue_ms: time that the operations since the last applied update waited, ms.
        private: what makes it a private run; None for any other.
        released_seq: its newest private step that was told; nothing before it is replayed.
        window: of a private run of client's batches, their units since the last step; None until it
            is known.
        restoring: its state is being brought to a worker; nothing may be sent before it is there.
        active_s: when its last operation ended, on the monotonic clock; 0 if that was before the
            coordinator.
    """

    row: RunRow
    config: training.RunConfig
    step: int
    epoch: int
    base_artifact_id: str | None
    base_seq: int
    status: int
    next_seq: int = 1
    executed_seq: int = 0
    worker_id: str | None = None
    restoring: bool = False
    early: dict[int, PendingOperation] = field(default_factory=dict)
    queue: deque[PendingOperation] = field(default_factory=deque)
    new_voids: int = 0
    in_flight: deque[PendingOperation] = field(default_factory=deque)
    by_seq: dict[int, PendingOperation] = field(default_factory=dict)
    pruned_seq: int = 0
    snapshot_seq: int = 0
    useless_snapshots: dict[str, set[str]] = field(default_factory=dict)
    passed_over: set[str] = field(default_factory=set)
    pruning: asyncio.Lock = field(default_factory=asyncio.Lock)
    pinned: int = 0
    replay_mismatches: int = 0
    epochs_unwritten: int = 0
    gap_timer: asyncio.TimerHandle | None = None
    gap_seq: int = 0
    window_queue_ms: float = 0.0
    active_s: float = 0.0
    arriving: bool = False
    losses: Losses = field(default_factory=Losses)
    attempted: bool = False
    on_trial: bool = False
    given_up: list[str] = field(default_factory=list)
    resting: bool = False
    private: PrivateRun | None = None
    released_seq: int = 0
    window: OpenWindow | None = None

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def tenant_id(self) -> str:
        return self.row.tenant_id

    @property
    def model(self) -> str:
        return self.row.model

    @property
    def deleted(self) -> bool:
        return self.status == training.RUN_STATUS_DELETED

    @property
    def open_seq(self) -> int:
        """The first operation that has not ended, or that is still to come."""
        return min(self.next_seq, min(self.by_seq, default=self.next_seq))

    @property
    def reached_seq(self) -> int:
        """The last operation that was sent to a worker or ended without: what comes after it waits,
        and so may some before it that were taken back, at the head of the queue."""
        seq = self.next_seq - 1
        for operation in reversed(self.queue):
            first, last = operation.seqs
            if last != seq:
                break
            seq = first - 1
        return seq

    def begin_epoch(self) -> int:
        """The epoch of a new assignment, which no worker was ever given."""
        self.epoch += 1 + self.epochs_unwritten
        self.epochs_unwritten = 0
        return self.epoch

    @asynccontextmanager
    async def past_kept(self) -> AsyncIterator[None]:
        """Nothing of the run's past is pruned meanwhile."""
        async with self.pruning:
            self.pinned += 1
        try:
            yield
        finally:
            self.pinned -= 1


def run_state(row: RunRow, *, epochs_unwritten: int = 0) -> RunState:
    """A run as the store has it, with nothing queued."""
    config = training.RunConfig.FromString(row.config)
    return RunState(
        row=row,
        config=config,
        step=row.step,
        epoch=row.epoch,
        base_artifact_id=row.base_artifact_id,
        base_seq=row.base_seq,
        status=row.status,
        pruned_seq=row.pruned_seq,
        replay_mismatches=row.replay_mismatches,
        epochs_unwritten=epochs_unwritten,
        private=PrivateRun.of(row.id, config) if config.dp.enabled else None,
        released_seq=row.released_seq,
    )


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
    futures.clear()
