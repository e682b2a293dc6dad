"""What the coordinator asks of its durable store.

Every read of tenants' data names the tenant, and the store itself applies it: another tenant's row
and a missing row are both None. Writes that a caller must see on disk before it answers return a
future; writes are committed in the order of the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tensafe.v1.artifacts_pb2 import Artifact
from tensafe.v1.datasets_pb2 import Dataset
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.v1.models_pb2 import Model
from tensafe_server.store.charges import ChargeEnd, LedgerRecord, LedgerRow, Reservation


class SchemaTooNewError(RuntimeError):
    """The store was written by a newer version of TenSafe."""


class StoreDamagedError(RuntimeError):
    """Committed transactions cannot be read, and starting would drop them."""


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A mutation's idempotency key, the hash of what was asked, and the id of what was made."""

    scope: str
    request_id: str
    request_hash: bytes
    subject: str


@dataclass(frozen=True, slots=True)
class TenantRow:
    id: str
    name: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    id: str
    secret_sha256: bytes
    kind: int
    tenant_id: str | None
    name: str
    created_ns: int
    revoked_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    id: str
    tenant_id: str
    model: str
    config: bytes
    status: int
    step: int
    epoch: int
    base_artifact_id: str | None
    base_seq: int
    created_ns: int
    pruned_seq: int = 0
    replay_mismatches: int = 0
    released_seq: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A run's recovery point; `sha256` is that of its manifest.

    With a `charge_id` it is none yet: it becomes one with the charge's commit.
    """

    id: str
    run_id: str
    epoch: int
    seq: int
    step: int
    size_bytes: int
    sha256: str
    created_ns: int
    charge_id: str | None = None


@dataclass(frozen=True, slots=True)
class StoreUse:
    """Sizes in bytes; `free_bytes` of the file are free to be used again."""

    file_bytes: int
    free_bytes: int
    operations: int
    snapshots: int
    artifacts: int


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where a run's order stands: `gaps` are the seqs missing below `max_seq`."""

    max_seq: int
    gaps: Sequence[int]
    last_executed_seq: int


@dataclass(slots=True)
class OperationRow:
    """An accepted or refused operation; the last block is set when it has finished.

    Attributes:
        spec_bytes: size of the spec, wherever it lies.
        deadline_ns: if it has not started by then, it never runs; None once it has.
    """

    id: str
    tenant_id: str
    run_id: str | None
    seq: int | None
    request_id: str | None
    session_id: str
    kind: int
    state: int
    executed: bool
    spec_hash: bytes
    spec: bytes | None
    spec_ref: str | None
    artifact_id: str | None
    cost: float
    created_ns: int

    spec_bytes: int = 0
    deadline_ns: int | None = None

    result: bytes | None = None
    result_ref: str | None = None
    error: bytes | None = None
    finished_ns: int | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None
    cursor: int | None = None
    fingerprint: str | None = None
    result_pruned: bool = False


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """A worker process that was at something, and has not told its end.

    Attributes:
        subject: id of an unfinished operation; or of a run, whose state was brought to the worker.
        worker: `Register.instance` of the process.
        running: it had begun the operation; False: that is not known.
    """

    subject: str
    worker: str
    running: bool


@dataclass(frozen=True, slots=True)
class UploadRow:
    """An adapter on its way in; `body` is the BeginUploadRequest."""

    id: str
    tenant_id: str
    artifact_id: str
    body: bytes
    created_ns: int
    finished: bool


@dataclass(frozen=True, slots=True)
class DatasetUploadRow:
    """A dataset on its way in; `body` is the BeginDatasetUploadRequest."""

    id: str
    tenant_id: str
    body: bytes
    created_ns: int
    dataset_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunUpdate:
    """New values of a run's row after some of its operations finished."""

    run_id: str
    step: int
    base_artifact_id: str | None
    base_seq: int
    released_seq: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything that one report of finished operations changes, committed together.

    Attributes:
        metrics, artifacts: each with its tenant's id.
        attempted: ids of those of the operations that have attempts, which end with them.
    """

    operations: Sequence[OperationRow]
    metrics: Sequence[tuple[str, StepMetrics]] = ()
    artifacts: Sequence[tuple[str, Artifact]] = ()
    runs: Sequence[RunUpdate] = ()
    attempted: Sequence[str] = ()
    charges: Sequence[ChargeEnd] = ()
    snapshots: Sequence[str] = ()  # ids of those that become recovery points now


@dataclass(frozen=True, slots=True)
class EventScope:
    """Which events a watcher sees."""

    tenant_id: str
    session_id: str | None = None
    run_id: str | None = None
    include_metrics: bool = False
    include_operations: bool = True


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, newest first: rows older than `before` (a row number), at most
    `size`."""

    size: int
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """Specs that were taken out of the log: keys of their blobs; `more` if the limit cut it off."""

    blobs: Sequence[str]
    operations: int
    more: bool


class Store(Protocol):
    """Durable state. One process owns it."""

    # Identity.
    async def tenants(self) -> list[TenantRow]: ...
    async def keys(self) -> list[KeyRow]: ...
    async def add_tenant(self, row: TenantRow, request: RequestRow | None = None) -> None: ...
    async def add_key(self, row: KeyRow, request: RequestRow | None = None) -> None: ...
    async def revoke_key(self, key_id: str, revoked_ns: int) -> None: ...

    # Idempotency of mutations: the first call of this key, if there was one. What a mutation adds
    # is committed together with its key.
    async def request(self, scope: str, request_id: str) -> RequestRow | None: ...
    async def remember(self, request: RequestRow) -> None: ...

    # Runs.
    async def add_run(self, row: RunRow, request: RequestRow | None = None) -> None: ...
    async def runs(self) -> list[RunRow]: ...
    async def run_progress(self) -> dict[str, RunProgress]: ...
    async def set_run_status(self, run_id: str, status: int) -> None: ...
    def set_run_epoch(self, run_id: str, epoch: int) -> asyncio.Future[None]: ...

    # The operation log.
    # `then` is called after the commit, in the order of the calls, before anyone who awaits it.
    # A disk that does not take a write (full, read-only, locked) fails it with TenSafeFault
    # STORAGE_FULL or STORAGE_UNAVAILABLE; one that insists, `finish`, `set_run_epoch` and those of
    # attempts wait until it does, and so keep their order.
    def add_operations(
        self,
        rows: Sequence[OperationRow],
        then: Callable[[], None] | None = None,
        *,
        insist: bool = False,
    ) -> asyncio.Future[None]: ...
    def finish(
        self, finish: Finish, then: Callable[[], None] | None = None
    ) -> asyncio.Future[None]: ...
    def end_deadlines(self, operation_ids: Sequence[str]) -> asyncio.Future[None]: ...
    async def flushed(self) -> None: ...
    async def operation(self, tenant_id: str, operation_id: str) -> OperationRow | None: ...
    async def operation_by_seq(self, run_id: str, seq: int) -> OperationRow | None: ...
    async def operation_by_request(
        self, tenant_id: str, request_id: str
    ) -> OperationRow | None: ...
    async def operations(
        self, tenant_id: str, run_id: str | None, states: Sequence[int], page: Page
    ) -> list[tuple[int, OperationRow]]: ...
    async def existing_operations(self, run_id: str, ids: Sequence[str]) -> set[str]: ...
    async def unfinished(self) -> list[OperationRow]: ...  # without their specs
    async def specs(
        self, operation_ids: Sequence[str]
    ) -> dict[str, tuple[bytes | None, str | None]]: ...  # (spec, spec_ref) by operation
    async def history(
        self, run_id: str, after_seq: int, limit: int, *, with_specs: bool = True
    ) -> list[OperationRow]: ...

    # What workers were at.
    def add_attempts(self, rows: Sequence[AttemptRow]) -> asyncio.Future[None]: ...
    def remove_attempts(self, subject: str) -> asyncio.Future[None]: ...
    def remove_attempts_by(self, worker: str) -> asyncio.Future[None]: ...
    async def attempts(self) -> list[AttemptRow]: ...

    # Recovery points, and what nobody needs any more.
    def add_snapshot(self, row: SnapshotRow) -> asyncio.Future[None]: ...
    async def snapshot(self, snapshot_id: str) -> SnapshotRow | None: ...
    async def snapshots(self, run_id: str) -> list[SnapshotRow]: ...
    async def newest_snapshots(self) -> dict[str, int]: ...
    async def staged_snapshots(self) -> list[SnapshotRow]: ...
    async def remove_snapshots(self, ids: Sequence[str]) -> None: ...
    async def count_mismatch(self, run_id: str) -> None: ...
    async def prune_specs(self, run_id: str, up_to_seq: int, limit: int) -> Pruned: ...
    async def old_results(
        self, before_ns: int, run_id: str | None, limit: int, skip: int = 0
    ) -> list[OperationRow]: ...
    async def replace_results(self, rows: Sequence[tuple[str, bytes | None]]) -> None: ...
    async def blob_references(self) -> set[str]: ...
    async def use(self) -> StoreUse: ...

    # The privacy ledger: append-only, a hash chain for each dataset of a tenant.
    async def reserve_charge(self, reservation: Reservation) -> LedgerRow | None: ...
    async def end_charges(self, ends: Sequence[ChargeEnd]) -> None: ...
    async def ledger(
        self, tenant_id: str, dataset_id: str, after: int = 0, limit: int = -1
    ) -> list[LedgerRow]: ...
    async def ledger_record(self, tenant_id: str, dataset_id: str) -> LedgerRecord: ...
    async def open_charges(self) -> list[LedgerRow]: ...
    async def unit_uses(self, run_id: str, units: Sequence[bytes]) -> dict[bytes, int]: ...
    async def secret(self, name: str, fresh: bytes) -> bytes: ...

    # Events.
    async def last_cursor(self) -> int: ...
    async def finished_operations(
        self, scope: EventScope, after: int, up_to: int, limit: int
    ) -> list[OperationRow]: ...
    async def step_metrics(
        self, scope: EventScope, after: int, up_to: int, limit: int
    ) -> list[StepMetrics]: ...
    async def coalesced_metrics(
        self, scope: EventScope, after: int, up_to: int, most: int
    ) -> list[StepMetrics]:
        """About so many of the metrics after a cursor, evenly spread, and each run's newest. Each
        says how many of its run, after the cursor, lie before it and were left out."""
        ...

    # Artifacts.
    async def artifact(self, tenant_id: str | None, artifact_id: str) -> Artifact | None: ...
    async def artifact_at(self, run_id: str, step: int) -> Artifact | None: ...
    async def artifacts(
        self, tenant_id: str, run_id: str | None, page: Page, now_ns: int
    ) -> list[tuple[int, Artifact]]: ...
    async def artifact_use(self, artifact_id: str) -> str | None: ...
    async def delete_artifact(self, artifact: Artifact) -> None: ...
    async def artifacts_to_remove(self) -> list[str]: ...
    async def artifact_removed(self, artifact_id: str) -> None: ...
    async def expired_artifacts(self, now_ns: int) -> list[Artifact]: ...
    async def next_expiry(self, after_ns: int) -> int | None: ...

    # Uploads.
    async def add_upload(self, row: UploadRow, request: RequestRow) -> None: ...
    async def upload(self, tenant_id: str, upload_id: str) -> UploadRow | None: ...
    async def open_uploads(self, tenant_id: str | None) -> list[UploadRow]: ...
    async def finish_upload(self, upload_id: str, tenant_id: str, artifact: Artifact) -> None: ...
    async def drop_upload(self, upload_id: str) -> None: ...

    # Datasets.
    async def datasets(self) -> list[tuple[str, Dataset]]: ...  # (tenant id, dataset)
    async def put_dataset(
        self, tenant_id: str, dataset: Dataset, upload_id: str | None = None
    ) -> None: ...
    async def add_dataset_upload(self, row: DatasetUploadRow, request: RequestRow) -> None: ...
    async def dataset_upload(self, tenant_id: str, upload_id: str) -> DatasetUploadRow | None: ...
    async def open_dataset_uploads(self) -> list[DatasetUploadRow]: ...
    async def drop_dataset_upload(self, upload_id: str) -> None: ...

    # Models.
    async def models(self) -> list[Model]: ...
    async def put_model(self, model: Model) -> None: ...

    async def close(self) -> None: ...
