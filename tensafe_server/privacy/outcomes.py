"""How operations of private runs end: what is told, what is spent, where a recovery begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.privacy.budgets import Budgets, Charge
from tensafe_server.privacy.draws import Draws
from tensafe_server.privacy.released import (
    dp_metrics,
    may_tell_of_draw,
    release_error,
    release_result,
    step_metrics,
)
from tensafe_server.privacy.steps import STEPS, PrivateSteps
from tensafe_server.store.charges import ChargeEnd, LedgerEvent

if TYPE_CHECKING:
    from tensafe_server.operations.outcomes import Ending

log = logging.getLogger(__name__)


class PrivateOutcomes:
    """The part of settling that only private runs have."""

    def __init__(
        self,
        ledger: Ledger,
        budgets: Budgets,
        steps: PrivateSteps,
        snapshots: SnapshotBook,
        draws: Draws,
    ) -> None:
        self._draws = draws
        self._ledger = ledger
        self._budgets = budgets
        self._steps = steps
        self._snapshots = snapshots

    async def complete(self, ending: Ending) -> None:
        """Adds what a step has cost, and takes out what is not to be told."""
        operation = ending.operation
        run = self._ledger.runs.get(operation.row.run_id or "")
        private = run.private if run is not None else None
        if run is None or private is None:
            ending.snapshot_id = ""
            return
        charge = operation.charge
        self._check(ending)
        if ending.result is not None:
            release_result(private, ending.result)
            if charge is not None and ending.result.optim_step.applied:
                cost = charge.cost or await self._budgets.cost(run.tenant_id, private)
                step = ending.result.optim_step
                step.dp.CopyFrom(dp_metrics(private, cost, step.dp))
                ending.step_metrics = step_metrics(private, list(ending.step_metrics), step.dp)
        elif ending.error is not None and ending.executed and operation.row.kind in STEPS:
            log.info("%s failed: %s", operation.row.id, ending.error.message)
            if may_tell_of_draw(private, ending.error):
                ending.charge_unused = False
            ending.error = release_error(private, ending.error, operation.row.id)
        if private.server_poisson and operation.row.kind in STEPS:
            ending.compute_ms = 0.0  # it tells how much was drawn

    def end_charge(self, ending: Ending, charge: Charge) -> ChargeEnd:
        """What is to be written down of a step's charge."""
        if ending.snapshot_id:
            event = LedgerEvent.COMMIT
        elif ending.charge_unused or not charge.handed_over:
            event = LedgerEvent.RELEASE
        else:
            event = LedgerEvent.LOSE
        return self._budgets.end(charge, event)

    def ended(self, ending: Ending) -> None:
        """The outcome is on disk."""
        operation = ending.operation
        run = self._ledger.runs.get(operation.row.run_id or "")
        if run is None or run.private is None:
            return
        self._steps.ended(run, operation, ending.result)
        self._draws.forget(operation.row.id)
        if ending.snapshot_id:
            self._snapshots.confirm(run, ending.snapshot_id)
        elif operation.charge is not None:
            self._snapshots.drop_staged(operation.charge.id)

    def _check(self, ending: Ending) -> None:
        """A step counts as made only if it was charged, and the state after it is on disk."""
        operation = ending.operation
        applied = ending.result is not None and ending.result.optim_step.applied
        charge = operation.charge
        if applied:
            staged = self._snapshots.staged(ending.snapshot_id)
            if charge is None or staged is None or staged.charge_id != charge.id:
                log.error(
                    "%s was applied without a charge, or its state is not on disk",
                    operation.row.id,
                )
                ending.result, ending.step_metrics = None, []
                ending.error = TenSafeFault(
                    "INTERNAL",
                    f"the worker has not stored the state after private step {operation.row.id}, "
                    "so that it cannot be told; its charge counts as spent. Tell the operator",
                    operation_id=operation.row.id,
                ).detail
        if ending.result is None or not applied:
            ending.snapshot_id = ""
        # Whatever was handed over and not given back may have been released.
        if charge is not None and charge.handed_over and not ending.charge_unused:
            ending.executed = True
