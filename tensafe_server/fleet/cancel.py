"""Cancels and deadlines: what has not started never runs; what has started runs to its end, but
for a sample, which a cancel stops at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import ErrorDetail, TenSafeFault
from tensafe_server.fleet.dispatcher import Dispatcher
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RUNNING, PendingOperation, RunState
from tensafe_server.operations.outcomes import (
    Outcomes,
    cancellation,
    content_lost,
    expiry,
    withdrawn,
)
from tensafe_server.store.base import Store

_Why = Callable[[PendingOperation], ErrorDetail]


class Cancellation:
    """Withdraws operations, wherever they are."""

    def __init__(
        self, store: Store, ledger: Ledger, outcomes: Outcomes, dispatcher: Dispatcher
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._outcomes = outcomes
        self._dispatcher = dispatcher
        self._tasks: set[asyncio.Task[None]] = set()

    async def cancel(self, operation: PendingOperation) -> None:
        """Returns when it is known whether the operation was cancelled, runs, or has ended."""
        if operation.is_sample and operation.worker_id is not None:
            self._ask_worker(operation, cancellation)
            await operation.wait_finished()
        else:
            await self._withdraw(operation, cancellation)

    async def cancel_run(self, run: RunState) -> None:
        """Cancels whatever of a run has not started, and its samples."""
        for operation in run.in_flight:
            if operation.is_sample or not _has_begun(operation):
                self._ask_worker(operation, cancellation)
        await self._end_waiting([*run.queue, *run.early.values()], cancellation)

    def cancel_deleted(self) -> None:
        """Begins to cancel what a kill left waiting in runs that were being deleted: a full disk is
        not to keep the service from its start."""
        for run in self._ledger.runs.values():
            if run.deleted and run.by_seq:
                self._spawn(self.cancel_run(run))

    def fail_waiting(self, operations: Sequence[PendingOperation], fault: TenSafeFault) -> None:
        """Fails operations that no worker has, since the state that they need is lost."""
        self._spawn(self._end_waiting(operations, lambda _: fault.detail))

    def refuse(self, operation: PendingOperation, why: ErrorDetail) -> None:
        """Fails an operation that no worker has."""
        self._spawn(self._end_waiting([operation], lambda _: why))

    def watch_deadline(self, operation: PendingOperation) -> None:
        """Starts the clock of an operation that has a deadline."""
        if operation.row.deadline_ns is None:
            return
        left_s = max(0.0, (operation.row.deadline_ns - time.time_ns()) / 1e9)
        loop = asyncio.get_running_loop()
        operation.deadline_timer = loop.call_later(left_s, self._expire, operation)

    def end_deadlines(self, operations: Iterable[PendingOperation]) -> None:
        """These have begun: should their worker be lost, they begin again however late it is."""
        timed = [one for one in operations if one.row.deadline_ns is not None]
        for operation in timed:
            operation.row.deadline_ns = None
            operation.stop_deadline()
        if timed:
            self._store.end_deadlines([one.row.id for one in timed])

    def give_up(self, operation: PendingOperation) -> None:
        """Ends an operation whose spec was lost from the store, or damaged in it."""
        fault = content_lost(operation)
        self._spawn(self._end_waiting([operation], lambda _: fault.detail))

    def _expire(self, operation: PendingOperation) -> None:
        if _has_begun(operation) or operation.void or operation.finishing:
            return
        self._spawn(self._withdraw(operation, expiry))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _withdraw(self, operation: PendingOperation, why: _Why) -> None:
        if operation.worker_id is None:
            await self._end_waiting([operation], why)
        elif operation.row.state != RUNNING:
            if not _has_begun(operation):
                self._ask_worker(operation, why, waiting_only=True)
            await operation.wait_started()

    async def _end_waiting(self, operations: Iterable[PendingOperation], why: _Why) -> None:
        endings = [withdrawn(one, why(one)) for one in operations if not one.void]
        for ending in endings:
            self._ledger.void(ending.operation)
        await (await self._outcomes.settle(endings))

    def _ask_worker(
        self, operation: PendingOperation, why: _Why, *, waiting_only: bool = False
    ) -> None:
        # If the worker is lost before it answers, this says that the operation is not to go on.
        if operation.withdrawn is None or not waiting_only:
            operation.withdrawn = why(operation)
        link = self._dispatcher.link_of(operation)
        if link is not None:
            cancel = pb.CancelPlanned(operation_id=operation.row.id, waiting_only=waiting_only)
            link.send(pb.ConnectResponse(cancel=cancel))


def _has_begun(operation: PendingOperation) -> bool:
    """Whether an operation runs to its end: a private step does from when a worker has its charge,
    since what comes behind it was sent as for the window after it."""
    charge = operation.charge
    return operation.row.state == RUNNING or (charge is not None and charge.handed_over)
