"""Bringing runs and unfinished operations back from the store after a restart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.ids import first_number
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation, RunState, run_state
from tensafe_server.store.base import OperationRow, RunProgress, Store

_PAGE = 1024
_EPOCHS_UNWRITTEN = 1024
"""An epoch is on disk one group commit after its assignment is sent, and a killed coordinator may
have sent this many in that time at the very most. One whose disk has lost what was written may have
given any number up to those of `first_number`."""


async def recover(
    store: Store,
    payloads: Payloads,
    models: ModelRegistry,
    ledger: Ledger,
    on_missing: Callable[[PendingOperation], None],
) -> int:
    """Fills the ledger from the store; returns the number of unfinished operations.

    Args:
        on_missing: called with an operation of which cannot be told any more what it was to do.
    """
    first = first_number()
    for row in await store.runs():
        unwritten = max(_EPOCHS_UNWRITTEN, first - row.epoch)
        ledger.runs[row.id] = run_state(row, epochs_unwritten=unwritten)
    for run_id, seq in (await store.newest_snapshots()).items():
        ledger.runs[run_id].snapshot_seq = seq
    unfinished = await store.unfinished()
    by_run: dict[str, list[OperationRow]] = {}
    lane: list[PendingOperation] = []
    for operation in unfinished:
        if operation.run_id is not None and operation.seq is not None:
            by_run.setdefault(operation.run_id, []).append(operation)
        else:
            lane.append(await _lane_operation(store, payloads, models, ledger, operation))
    for run_id, progress in (await store.run_progress()).items():
        await _recover_run(store, ledger, ledger.runs[run_id], by_run.get(run_id, []), progress)
    for pending in lane:
        ledger.reserve(pending, None)
    ledger.admit(lane)
    for pending in lane:
        if not pending.model:
            on_missing(pending)
    return len(unfinished)


async def _recover_run(
    store: Store,
    ledger: Ledger,
    run: RunState,
    unfinished: list[OperationRow],
    progress: RunProgress,
) -> None:
    run.executed_seq = progress.last_executed_seq
    waiting = {row.seq or 0: row for row in unfinished}
    first = min([progress.max_seq + 1, *waiting, *progress.gaps])
    # What was being executed while later operations ended; what else has ended up to there is the
    # log's to tell.
    reached = max(first - 1, run.executed_seq)
    behind = [waiting.pop(seq) for seq in sorted(waiting) if seq <= reached]
    ledger.resume(run, [_pending(row, run) for row in behind], reached)
    after = reached
    while after < progress.max_seq:
        # Those among them that were refused or cancelled may be many more than wait.
        void = await store.history(run.id, after, _PAGE, with_specs=False)
        is_last = len(void) < _PAGE
        after = progress.max_seq if is_last else void[-1].seq or progress.max_seq
        waiting.update({row.seq or 0: row for row in void})
        rows = [waiting.pop(seq) for seq in sorted(waiting) if seq <= after]
        operations = [_pending(row, run) for row in rows]
        for pending in operations:
            ledger.reserve(pending, run)
        ledger.admit(operations)


def _pending(row: OperationRow, run: RunState) -> PendingOperation:
    # The worker that holds the run, if there is one, may have it.
    return PendingOperation(row, None, run.model, void=row.cursor is not None, sent_under=run.epoch)


async def _lane_operation(
    store: Store,
    payloads: Payloads,
    models: ModelRegistry,
    ledger: Ledger,
    row: OperationRow,
) -> PendingOperation:
    if row.run_id is not None:
        reference = ledger.runs[row.run_id].model
    elif row.artifact_id is not None:
        artifact = await store.artifact(row.tenant_id, row.artifact_id)
        reference = artifact.model_ref if artifact is not None else ""
    else:
        reference = ""
        with suppress(BlobNotFoundError, DamagedPayloadError):
            data = await payloads.load(*(await store.specs([row.id]))[row.id])
            reference = training.OperationSpec.FromString(data).sample.weights.base_model
    with suppress(TenSafeFault):  # until its worker registers the model, the operation waits
        reference = models.find(reference).name
    return PendingOperation(row, None, reference)
