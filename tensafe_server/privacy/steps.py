"""What a private run's operation needs before it may be sent, and where its window stands.

A step needs a charge in the ledger. It is written down when nothing of the run is with a worker any
more, so that it is lost only if the step itself is. A client's batch needs its units' numbers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tensafe import failpoints
from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.types_pb2 import Tensor
from tensafe.wire.status import ErrorDetail, TenSafeFault
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.operations.model import SUCCEEDED, PendingOperation, RunState
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.participation import OpenWindow, unit_keys
from tensafe_server.privacy.runs import PrivateRun
from tensafe_server.store.base import OperationRow, Store
from tensafe_server.store.charges import LedgerEvent
from tensafe_server.unexpected import unexpected

log = logging.getLogger(__name__)

STEPS = frozenset({ops.OPERATION_KIND_OPTIM_STEP, ops.OPERATION_KIND_PRIVATE_STEP})
_GRADIENT = ops.OPERATION_KIND_FORWARD_BACKWARD
_LOAD = ops.OPERATION_KIND_LOAD_STATE
_DISK = frozenset({"STORAGE_FULL", "STORAGE_UNAVAILABLE"})
_RETRY_S = 1.0
_PAGE = 256
_SECRET = "dp_unit_key"  # noqa: S105 - its name


class PrivateSteps:
    """Prepares operations of private runs.

    Attributes:
        on_ready: called when something may be sent that could not.
        on_refused: called with an operation that cannot be executed, and why. If it has a charge,
            that is lost with it.
    """

    def __init__(self, store: Store, payloads: Payloads, budgets: Budgets) -> None:
        self._store = store
        self._payloads = payloads
        self._budgets = budgets
        self._secret = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_ready: Callable[[], None] = lambda: None
        self.on_refused: Callable[[PendingOperation, ErrorDetail], None] = lambda op, why: None

    async def load(self, pending: Callable[[str], PendingOperation | None]) -> set[str]:
        """Takes up what a crash has left: charges of which nobody knows what became; their ids."""
        self._secret = await self._store.secret(_SECRET, secrets.token_bytes(32))
        charges = await self._budgets.load()
        for operation_id, charge in charges.items():
            operation = pending(operation_id)
            if operation is not None:
                operation.charge = charge
        return {charge.id for charge in charges.values()}

    def sendable(
        self, run: RunState, waiting: Sequence[PendingOperation], placeable: bool
    ) -> Sequence[PendingOperation]:
        """The first few of what waits that may be sent now; begins to prepare the one after them.

        Args:
            placeable: a worker is there that could take the run on, if none has it.
        """
        private = run.private
        if private is None or not waiting:
            return waiting
        if run.worker_id is None:
            head = waiting[0]
            if head.charge is None:
                return waiting[:1]  # it is prepared once the run has its place
            if placeable and not head.preparing:
                self._spawn(run, head, self._forfeit(run, head))
            return []
        if waiting[0].spec is None:
            return waiting[:1]  # it is read first
        found: list[PendingOperation] = []
        for operation in waiting:
            if not self._is_prepared(run, operation):
                if self._may_prepare(run, operation, found):
                    self._spawn(run, operation, self._prepare(run, operation))
                break
            found.append(operation)
        return found

    def may_send(self, run: RunState, operation: PendingOperation) -> bool:
        """Whether the next operation of a run that a worker has is prepared."""
        return run.private is None or self._is_prepared(run, operation)

    def dress(self, operation: PendingOperation, planned: pb.PlannedOperation) -> None:
        """Adds to what a worker is told what was prepared."""
        if operation.charge is not None:
            operation.charge.handed_over = True
            planned.charge.id = operation.charge.id
            planned.charge.ledger_position = operation.charge.reserved.position
        if operation.units is not None:
            planned.units.CopyFrom(operation.units)

    def ended(
        self, run: RunState, operation: PendingOperation, result: ops.OperationResult | None
    ) -> None:
        """Notes what an operation that has ended has made of the run's window."""
        private, row = run.private, operation.row
        if private is None:
            return
        if row.kind == _LOAD and row.state == SUCCEEDED:
            run.window = OpenWindow()
        elif row.kind in STEPS and not row.executed and operation.charge is not None:
            self._reopen(run)  # it was cancelled, charged but not sent
        elif (
            row.kind in STEPS and row.executed and not self._closed_when_charged(private, operation)
        ):
            run.window = run.window if result and not result.optim_step.applied else OpenWindow()

    async def units(self, run: RunState) -> dict[str, Tensor]:
        """The units' numbers of the settled batches of the open window, by operation."""
        window, found = await self._rebuild(run)
        if run.window is None:
            run.window = window
        return found

    def _is_prepared(self, run: RunState, operation: PendingOperation) -> bool:
        if operation.preparing:
            return False
        if operation.row.kind in STEPS:
            return operation.charge is not None and operation.charge.epoch == run.epoch
        return operation.row.kind != _GRADIENT or operation.units is not None

    def _may_prepare(
        self, run: RunState, operation: PendingOperation, before: Sequence[PendingOperation]
    ) -> bool:
        if operation.preparing:
            return False
        if operation.row.kind in STEPS:
            # A sample changes nothing, and may take its time.
            return not before and all(one.is_sample for one in run.in_flight)
        # Which window a batch belongs to must be known.
        assert run.private is not None
        closing = {_LOAD} if run.private.every_call_closes else {_LOAD, *STEPS}
        open_ones = any(
            one.row.kind in closing or _is_recovered(one) for one in (*run.in_flight, *before)
        )
        return operation.spec is not None and not open_ones

    def _spawn(
        self, run: RunState, operation: PendingOperation, work: Coroutine[Any, Any, None]
    ) -> None:
        operation.preparing = True
        task = asyncio.get_running_loop().create_task(self._work(operation, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, operation: PendingOperation, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except TenSafeFault as fault:
            if fault.detail.reason in _DISK:
                log.warning("%s waits: %s", operation.row.id, fault)
                await asyncio.sleep(_RETRY_S)
            else:
                self._refuse(operation, fault)
        except Exception as error:
            self._refuse(operation, unexpected(log, f"preparing {operation.row.id}", error))
        finally:
            operation.preparing = False
            self.on_ready()

    def _refuse(self, operation: PendingOperation, fault: TenSafeFault) -> None:
        if not operation.void and not operation.finishing:
            self.on_refused(operation, fault.detail)

    async def _prepare(self, run: RunState, operation: PendingOperation) -> None:
        private = run.private
        assert private is not None
        if operation.charge is not None:
            await self._forfeit(run, operation)
        elif operation.row.kind in STEPS:
            await self._charge(run, private, operation)
        else:
            spec = training.OperationSpec.FromString(operation.spec or b"")
            window = await self._window(run)
            operation.units = await self._take(window, run, private, spec)

    async def _charge(
        self, run: RunState, private: PrivateRun, operation: PendingOperation
    ) -> None:
        counted: list[bytes] = []
        if private.line.max_participation is not None:
            counted = list((await self._window(run)).used)
        charge = await self._budgets.reserve(
            run.tenant_id, private, run.id, operation.row.id, run.epoch, counted
        )
        failpoints.hit("after-charge")
        if operation.void or operation.finishing:  # it was cancelled meanwhile
            await self._budgets.end_alone(charge, LedgerEvent.RELEASE)
            return
        operation.charge = charge
        if private.every_call_closes:
            run.window = OpenWindow()

    async def _forfeit(self, run: RunState, operation: PendingOperation) -> None:
        """The worker is gone that a step was to be executed by. What was with it is spent, and is
        not done again: that would be another release of the same sum."""
        charge = operation.charge
        assert charge is not None
        if not charge.handed_over:
            operation.charge = None
            await self._budgets.end_alone(charge, LedgerEvent.RELEASE)
            self._reopen(run)
        elif operation.row.kind == ops.OPERATION_KIND_PRIVATE_STEP:
            # Its batch is drawn anew, under a charge of its own.
            operation.charge = None
            await self._budgets.end_alone(charge, LedgerEvent.LOSE)
        else:
            raise _lost(operation)

    async def _window(self, run: RunState) -> OpenWindow:
        if run.window is None:
            run.window, _ = await self._rebuild(run)
        return run.window

    async def _rebuild(self, run: RunState) -> tuple[OpenWindow, dict[str, Tensor]]:
        private = run.private
        assert private is not None
        window, found = OpenWindow(), {}
        after = run.released_seq
        while rows := await self._store.history(run.id, after, _PAGE):
            for row in rows:
                if row.kind == _GRADIENT and row.state == SUCCEEDED:
                    data = await self._payloads.load(row.spec, row.spec_ref)
                    spec = training.OperationSpec.FromString(data)
                    found[row.id] = await self._take(window, run, private, spec)
                elif _has_closed(row):
                    window, found = OpenWindow(), {}
            after = rows[-1].seq or after
        return window, found

    async def _take(
        self,
        window: OpenWindow,
        run: RunState,
        private: PrivateRun,
        spec: training.OperationSpec,
    ) -> Tensor:
        batch = spec.forward_backward.batch.inline
        keys = await asyncio.to_thread(unit_keys, batch, private.units, self._secret)
        most = private.line.max_participation
        uses = await self._store.unit_uses(run.id, list(set(keys))) if most is not None else {}
        return window.take(keys, uses, most)

    def _closed_when_charged(self, private: PrivateRun, operation: PendingOperation) -> bool:
        return private.every_call_closes and not _is_recovered(operation)

    def _reopen(self, run: RunState) -> None:
        """What was taken for closed is not. Nothing of the run was sent since."""
        run.window = None
        for operation in run.queue:
            operation.units = None


def _is_recovered(operation: PendingOperation) -> bool:
    """Whether it was charged before a restart."""
    return operation.charge is not None and operation.charge.cost is None


def _has_closed(row: OperationRow) -> bool:
    """Whether an operation after the newest release has closed the window, by the log."""
    if row.kind == _LOAD:
        return row.state == SUCCEEDED
    return row.kind in STEPS and row.executed and row.state != SUCCEEDED


def _lost(operation: PendingOperation) -> TenSafeFault:
    return TenSafeFault(
        "DP_STEP_LOST",
        f"the worker of run {operation.row.run_id} was lost during private step "
        f"{operation.row.id}. Its charge counts as spent, no update was made, and the gradient of "
        "its window is gone; send the window's batches again",
        operation_id=operation.row.id,
        run_id=operation.row.run_id,
    )
