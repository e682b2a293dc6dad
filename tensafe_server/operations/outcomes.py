"""How operations end: the outcome is committed, then told to everyone who waits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.rpc.status_pb2 import Status

from tensafe import failpoints
from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.artifacts_pb2 import AdapterShape, Artifact, ArtifactFile
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.v1.types_pb2 import REDUCTION_SUM, Metric
from tensafe.wire.status import REASON_CODES, ErrorDetail, TenSafeFault, from_status, to_status
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.events.hub import Event, EventHub
from tensafe_server.events.translate import describe, expires_at, timestamp
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import (
    CANCELLED,
    FAILED,
    SUCCEEDED,
    PendingOperation,
    RunState,
)
from tensafe_server.privacy.outcomes import PrivateOutcomes
from tensafe_server.storage_faults import storage_fault
from tensafe_server.store.base import Finish, RunUpdate, Store
from tensafe_server.store.charges import ChargeEnd

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_NEVER_RAN = ("OPERATION_CANCELLED", "DEADLINE_EXCEEDED")


@dataclass(slots=True)
class Ending:
    """What came of one operation.

    Attributes:
        result: set if it succeeded.
        error: set if it failed or was cancelled.
        executed: whether a worker ran it.
        step_metrics: of the update that it applied, without queue time.
        artifact_files: what was stored, for SAVE_STATE.
        snapshot_id: of an applied private step, the state after it.
        charge_unused: nothing was released under the operation's charge.
    """

    operation: PendingOperation
    result: ops.OperationResult | None = None
    error: ErrorDetail | None = None
    executed: bool = False
    compute_ms: float = 0.0
    step_metrics: Sequence[Metric] = ()
    artifact_files: Sequence[ArtifactFile] = ()
    snapshot_id: str = ""
    charge_unused: bool = False


class Outcomes:
    """Settles operations.

    Attributes:
        on_lost_store: called when an outcome could not be committed. What a caller must not lose
            cannot be kept then, and the coordinator has to stop.
        on_saved: called when an artifact was saved.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        hub: EventHub,
        payloads: Payloads,
        private: PrivateOutcomes,
    ) -> None:
        self._private = private
        self._store = store
        self._ledger = ledger
        self._hub = hub
        self._payloads = payloads
        self.on_saved: Callable[[], None] = lambda: None
        self.on_lost_store: Callable[[BaseException], None] = lambda error: None

    async def settle(self, endings: Sequence[Ending]) -> asyncio.Future[None]:
        """Writes outcomes in this order; the returned future resolves when all have been told.

        Call it again for the same run only after it returned, so that a run's outcomes reach the
        disk in the run's order.
        """
        endings = _first_of_each(endings)
        saved = [await self._save(ending) for ending in endings]
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not endings:
            told.set_result(None)
            return told
        finish, events = self._book(endings, saved)

        def tell() -> None:
            if finish.charges:
                failpoints.hit("after-private-commit")
            for ending in endings:
                self._ledger.retire(ending.operation)
                self._private.ended(ending)
            self._hub.publish(events)
            if not told.done():  # whoever waited for it may have gone
                told.set_result(None)
            if finish.artifacts:
                self.on_saved()
            self._ledger.on_ready()

        def check(committed: asyncio.Future[None]) -> None:
            error = committed.exception()
            if error is not None:
                log.critical("outcomes could not be stored", exc_info=error)
                self.on_lost_store(error)
                if not told.done():
                    told.set_exception(error)

        failpoints.hit("after-result-before-commit")
        self._store.finish(finish, tell).add_done_callback(check)
        return told

    async def _save(self, ending: Ending) -> tuple[bytes | None, str | None]:
        await self._private.complete(ending)
        if ending.result is None:
            return None, None
        if ending.result.HasField("save_state") and not await self._complete_artifact(ending):
            return None, None
        data = ending.result.SerializeToString()
        try:
            return await self._payloads.save(ending.operation.row.tenant_id, data)
        except Exception as error:  # a full disk, a share that is away, no thread to be had
            # A result must not be lost: the row takes it, and the store waits for its disk.
            log.warning("a result goes into the log: %s", error)
            return data, None

    async def _complete_artifact(self, ending: Ending) -> bool:
        """False: what its caller has said of it is lost, and it fails."""
        row = ending.operation.row
        while True:
            try:
                spec = await self._payloads.load(*(await self._store.specs([row.id]))[row.id])
                break
            except (BlobNotFoundError, DamagedPayloadError):
                log.exception("the spec of %s is gone or damaged", row.id)
                ending.result, ending.error = None, content_lost(ending.operation).detail
                return False
            except Exception as error:
                if storage_fault(error) is None and not isinstance(error, OSError):
                    raise
                log.exception("the spec of %s cannot be read; trying again", row.id)
                await asyncio.sleep(_RETRY_S)
        run = self._ledger.runs[row.run_id or ""]
        _complete(ending, run, training.OperationSpec.FromString(spec))
        return True

    def _book(
        self, endings: Sequence[Ending], saved: Sequence[tuple[bytes | None, str | None]]
    ) -> tuple[Finish, list[Event]]:
        now = time.time_ns()
        events: list[Event] = []
        metrics: list[tuple[str, StepMetrics]] = []
        artifacts: list[tuple[str, Artifact]] = []
        runs: dict[str, RunState] = {}
        charges: list[ChargeEnd] = []
        for ending, (result, result_ref) in zip(endings, saved, strict=True):
            row = ending.operation.row
            row.result, row.result_ref = result, result_ref
            row.executed = ending.executed
            row.finished_ns = now
            row.compute_ms = ending.compute_ms
            row.queue_ms = max(0.0, (now - row.created_ns) / 1e6 - ending.compute_ms)
            row.state = _state(ending)
            if ending.error is not None:
                row.error = to_status(ending.error).SerializeToString()
            row.cursor = self._hub.next_cursor()
            events.append(ended_event(ending.operation, ending.result))
            run = self._ledger.runs.get(row.run_id or "")
            if run is None:
                continue
            if ending.operation.charge is not None:
                charges.append(self._private.end_charge(ending, ending.operation.charge))
            if _advance(run, ending):
                runs[run.id] = run
            if ending.result is not None and ending.result.HasField("save_state"):
                artifacts.append((row.tenant_id, ending.result.save_state.artifact))
            run.window_queue_ms += row.queue_ms
            if ending.step_metrics:
                item = self._step_metrics(run, ending, now)
                metrics.append((row.tenant_id, item))
                event = ops.WatchEvent(metrics=item)
                size = event.ByteSize()
                events.append(Event(item.cursor, row.tenant_id, run.id, "", event, size))
        updates = [
            RunUpdate(run.id, run.step, run.base_artifact_id, run.base_seq, run.released_seq)
            for run in runs.values()
        ]
        rows = [ending.operation.row for ending in endings]
        finish = Finish(
            rows,
            metrics,
            artifacts,
            updates,
            attempted=[ending.operation.row.id for ending in endings if ending.operation.attempted],
            charges=charges,
            snapshots=[ending.snapshot_id for ending in endings if ending.snapshot_id],
        )
        return finish, events

    def _step_metrics(self, run: RunState, ending: Ending, now: int) -> StepMetrics:
        queue = Metric(name="queue_ms", value=run.window_queue_ms, reduction=REDUCTION_SUM)
        run.window_queue_ms = 0.0
        return StepMetrics(
            cursor=self._hub.next_cursor(),
            run_id=run.id,
            step=run.step,
            time=timestamp(now),
            values=[*ending.step_metrics, queue],
        )


def _first_of_each(endings: Sequence[Ending]) -> list[Ending]:
    """Those that count, which nothing may change any more: a worker that was sent an operation
    again may tell its end twice, also in one report."""
    first = []
    for ending in endings:
        if not ending.operation.finishing:
            ending.operation.finishing = True
            first.append(ending)
    return first


def cancellation(operation: PendingOperation) -> ErrorDetail:
    """Why an operation ends that its tenant cancelled."""
    how = "and gave nothing" if operation.is_sample else "and has no effect"
    return TenSafeFault(
        "OPERATION_CANCELLED",
        f"operation {operation.row.id} was cancelled {how}",
        operation_id=operation.row.id,
    ).detail


def expiry(operation: PendingOperation) -> ErrorDetail:
    """Why an operation ends whose deadline passed."""
    return TenSafeFault(
        "DEADLINE_EXCEEDED",
        f"operation {operation.row.id} had not started when its time to live was over; it never "
        "ran. Send it again with more time",
        operation_id=operation.row.id,
    ).detail


def content_lost(operation: PendingOperation) -> TenSafeFault:
    """Why an operation ends of which the store has lost what it was to do."""
    return TenSafeFault(
        "CHECKSUM_MISMATCH",
        f"what operation {operation.row.id} was to do is missing or damaged on the server; "
        "restore the blob store from a backup, or send the operation again",
        operation_id=operation.row.id,
    )


def withdrawn(operation: PendingOperation, why: ErrorDetail | None) -> Ending:
    """The outcome of an operation that was cancelled, or whose deadline passed, in time."""
    return Ending(operation, error=why or cancellation(operation))


def ended_event(operation: PendingOperation, result: ops.OperationResult | None = None) -> Event:
    """A finished operation as watchers get it."""
    row = operation.row
    event = ops.WatchEvent()
    describe(row, event.operation)
    if result is not None:
        event.operation.result.CopyFrom(result)
    return Event(
        row.cursor or 0,
        row.tenant_id,
        row.run_id or "",
        row.session_id,
        event,
        event.ByteSize(),
    )


def _state(ending: Ending) -> int:
    if ending.result is not None:
        return SUCCEEDED
    if ending.error is not None and ending.error.reason in _NEVER_RAN:
        return CANCELLED
    return FAILED


def _advance(run: RunState, ending: Ending) -> bool:
    """Applies an outcome to its run; says whether the run's row changed."""
    if ending.result is None:
        return False
    kind = ending.result.WhichOneof("result")
    if kind == "optim_step":
        run.step = ending.result.optim_step.step
        if run.private is not None and ending.result.optim_step.applied:
            run.released_seq = ending.operation.row.seq or 0
        return ending.result.optim_step.applied
    if kind == "load_state":
        run.step = ending.result.load_state.step
        return True
    # What a private run saves has no open window, so that a recovery cannot begin there.
    complete = ending.result.save_state.artifact.has_optimizer and run.private is None
    if kind == "save_state" and complete:
        run.base_artifact_id = ending.result.save_state.artifact.id
        run.base_seq = ending.operation.row.seq or 0
        return True
    return False


def _complete(ending: Ending, run: RunState, spec: training.OperationSpec) -> None:
    """Adds to the worker's description what the coordinator knows: identity, files, metadata."""
    assert ending.result is not None
    row = ending.operation.row
    artifact = ending.result.save_state.artifact
    files = sorted(ending.artifact_files, key=lambda file: file.name)
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    artifact.id = row.artifact_id or ""
    artifact.run_id = run.id
    artifact.model_ref = run.config.model_ref
    artifact.size_bytes = sum(file.size_bytes for file in files)
    artifact.sha256 = hashlib.sha256(listing.encode()).hexdigest()
    artifact.metadata.CopyFrom(spec.save_state.metadata)
    now = time.time_ns()
    artifact.created_at.CopyFrom(timestamp(now))
    if spec.save_state.HasField("ttl"):
        artifact.expires_at.CopyFrom(expires_at(now, spec.save_state.ttl))
    lora = run.config.lora
    artifact.adapter.CopyFrom(
        AdapterShape(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=sorted(lora.target_modules),
        )
    )
    del artifact.files[:]
    artifact.files.extend(files)


def as_error(status: Status) -> ErrorDetail:
    """A worker's error; what it does not name properly becomes INTERNAL."""
    detail = from_status(status)
    if detail.reason not in REASON_CODES:
        return TenSafeFault("INTERNAL", "the worker failed without a known reason").detail
    return detail
