"""Cancelling: what has not started never runs; what has started runs to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.dispatcher import Dispatcher
from tensafe_server.operations.model import RUNNING, PendingOperation, RunState
from tensafe_server.operations.outcomes import Ending, Outcomes, cancelled


class Cancellation:
    """Cancels operations, wherever they are."""

    def __init__(self, outcomes: Outcomes, dispatcher: Dispatcher) -> None:
        self._outcomes = outcomes
        self._dispatcher = dispatcher
        self._failing: set[asyncio.Task[asyncio.Future[None]]] = set()

    async def cancel(self, operation: PendingOperation) -> None:
        """Returns when it is known whether the operation was cancelled, runs, or has ended."""
        if operation.worker_id is None:
            await self._cancel_waiting([operation])
        elif operation.row.state != RUNNING:
            self._ask_worker(operation)
            await operation.wait_started()

    async def cancel_run(self, run: RunState) -> None:
        """Cancels whatever of a run has not started."""
        for operation in run.in_flight:
            if operation.row.state != RUNNING:
                self._ask_worker(operation)
        await self._cancel_waiting([*run.queue, *run.early.values()])

    def fail_waiting(self, run: RunState, fault: TenSafeFault) -> None:
        """Fails whatever of a run no worker has, since its state is lost."""
        endings = [Ending(op, error=fault.detail) for op in run.queue if not op.void]
        for ending in endings:
            ending.operation.void = True
        task = asyncio.get_running_loop().create_task(self._outcomes.settle(endings))
        self._failing.add(task)
        task.add_done_callback(self._failing.discard)

    async def _cancel_waiting(self, operations: Iterable[PendingOperation]) -> None:
        endings = [cancelled(operation) for operation in operations if not operation.void]
        for ending in endings:
            # From here on the dispatcher passes it over, even before the outcome is on disk.
            ending.operation.void = True
        await (await self._outcomes.settle(endings))

    def _ask_worker(self, operation: PendingOperation) -> None:
        link = self._dispatcher.link_of(operation)
        if link is not None:
            cancel = pb.CancelPlanned(operation_id=operation.row.id)
            link.send(pb.ConnectResponse(cancel=cancel))
