"""What the planner is told of operations and of runs that may soon go on."""

from __future__ import annotations

from tensafe.v1 import operations_pb2 as ops
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation, RunState
from tensafe_server.planning.views import Kind, Work

_KINDS: dict[int, Kind] = {
    ops.OPERATION_KIND_FORWARD_BACKWARD: Kind.GRADIENT,
    ops.OPERATION_KIND_OPTIM_STEP: Kind.UPDATE,
    ops.OPERATION_KIND_SAMPLE: Kind.SAMPLE,
}


def work_of(operation: PendingOperation, run: RunState | None) -> Work:
    """An operation as the planner sees it, which it keeps as `work`.

    Gradients of a deterministic run go alone. So does what was running when a worker was lost,
    unless it is a sample: if it takes another one, it takes no other operation with it.
    """
    kind = _KINDS.get(operation.row.kind)
    if kind is Kind.GRADIENT and (run is None or run.config.deterministic):
        kind = None
    if operation.losses and kind is not Kind.SAMPLE:
        kind = None
    operation.work = Work(operation.row.cost, kind)
    return operation.work


def company(link: WorkerLink, ledger: Ledger, active_since_s: float) -> frozenset[str]:
    """Models of an idle worker's runs that have nothing queued, but had an operation at that time
    or later, and whose next one may be grouped with others."""
    runs = (ledger.runs[run_id] for run_id in link.runs)
    return frozenset(
        run.model
        for run in runs
        if not run.queue
        and (run.in_flight or run.active_s >= active_since_s)
        and not run.config.deterministic
        and not run.deleted
    )
