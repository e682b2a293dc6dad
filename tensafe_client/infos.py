"""Descriptions of runs, operations, artifacts, models, tenants and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tensafe.v1 import (
    admin_pb2,
    artifacts_pb2,
    models_pb2,
    operations_pb2,
    training_pb2,
    types_pb2,
)
from tensafe_client.config import TrainingConfig
from tensafe_client.errors import TenSafeError, from_status
from tensafe_client.results import enum_name, to_datetime, to_dict


@dataclass(frozen=True)
class RunInfo:
    """A run as the server sees it.

    Attributes:
        id: `run-…`.
        config: its configuration with every default filled in.
        status: "active" or "deleted".
        step: applied optimizer updates.
        next_seq: the seq of the next numbered operation.
        created_at: when it was created.
        replay_mismatches: replayed operations whose results were not those in the log; above 0,
            the run may differ from what it was before a recovery.
        snapshot_seq: the last operation in the newest snapshot, where a recovery would begin; 0 if
            there is none.
    """

    id: str
    status: str
    step: int
    next_seq: int
    created_at: datetime
    config: TrainingConfig
    replay_mismatches: int = 0
    snapshot_seq: int = 0

    @classmethod
    def from_proto(cls, message: training_pb2.Run) -> RunInfo:
        """Unpacks a run."""
        return cls(
            id=message.id,
            status=enum_name(training_pb2.RunStatus, message.status),
            step=message.step,
            next_seq=message.next_seq,
            created_at=to_datetime(message.created_at),
            config=TrainingConfig.from_proto(message.config),
            replay_mismatches=message.replay_mismatches,
            snapshot_seq=message.snapshot_seq,
        )


@dataclass(frozen=True)
class RunSummary:
    """A run of any tenant, as operators see it.

    Attributes:
        id: `run-…`.
        tenant_id: whose it is.
        model: the base model's registered name.
        status: "active" or "deleted".
        step, created_at, replay_mismatches, snapshot_seq: as in `RunInfo`.
    """

    id: str
    tenant_id: str
    model: str
    status: str
    step: int
    created_at: datetime
    replay_mismatches: int
    snapshot_seq: int

    @classmethod
    def from_proto(cls, message: admin_pb2.RunSummary) -> RunSummary:
        """Unpacks a run."""
        return cls(
            id=message.id,
            tenant_id=message.tenant_id,
            model=message.model,
            status=enum_name(training_pb2.RunStatus, message.status),
            step=message.step,
            created_at=to_datetime(message.created_at),
            replay_mismatches=message.replay_mismatches,
            snapshot_seq=message.snapshot_seq,
        )


@dataclass(frozen=True)
class ReplayMismatch:
    """A replayed operation whose result was not that in the log."""

    operation_id: str
    seq: int
    difference: str


@dataclass(frozen=True)
class VerifyReport:
    """What replaying a run from its log has shown.

    Attributes:
        reproduces: whether every replayed result was that in the log.
        from_seq: the last operation in the state from which the replay began; 0: a fresh adapter.
        to_seq: the last operation that had ended when it began.
        pruned: earlier operations are past the server's retention and were not replayed.
        replayed: operations replayed.
        exact: of them, those compared bit by bit.
        within_tolerance: of them, those compared within a tolerance, since another kind of machine
            gave the logged result, or one before it.
        mismatches: how many results differed.
        details: the first of those, at most 100.
    """

    run_id: str
    reproduces: bool
    from_seq: int
    to_seq: int
    pruned: bool
    replayed: int
    exact: int
    within_tolerance: int
    mismatches: int
    details: list[ReplayMismatch]

    @classmethod
    def from_proto(cls, run_id: str, message: training_pb2.VerifyReport) -> VerifyReport:
        """Unpacks a report."""
        return cls(
            run_id=run_id,
            reproduces=message.mismatches == 0,
            from_seq=message.from_seq,
            to_seq=message.to_seq,
            pruned=message.pruned,
            replayed=message.replayed,
            exact=message.exact,
            within_tolerance=message.within_tolerance,
            mismatches=message.mismatches,
            details=[
                ReplayMismatch(one.operation_id, one.seq, one.difference) for one in message.details
            ],
        )


@dataclass(frozen=True)
class OperationInfo:
    """A queued operation.

    Attributes:
        id: `op-…`.
        run_id: its run; empty for a sample from an artifact or a base model.
        seq: its place in the run's order; 0 if it has none.
        kind: "forward", "forward_backward", "optim_step", "sample", "save_state", "load_state".
        state: "queued", "running", "succeeded", "failed" or "cancelled".
        error: why it failed or was cancelled; None otherwise.
        created_at: when it was accepted.
        finished_at: when it ended; None before.
        queue_ms: time between acceptance and the start on a worker.
        compute_ms: time on the worker.
        fingerprint: what its numbers depend on beside the run, as 16 hexadecimal digits; empty
            before its end, if other runs' operations were in its pass, and of a sample.
    """

    id: str
    run_id: str
    seq: int
    kind: str
    state: str
    error: TenSafeError | None
    created_at: datetime
    finished_at: datetime | None
    queue_ms: float
    compute_ms: float
    fingerprint: str = ""

    @classmethod
    def from_proto(cls, message: operations_pb2.Operation) -> OperationInfo:
        """Unpacks an operation, without its result."""
        ended = message.HasField("finished_at")
        return cls(
            id=message.id,
            run_id=message.run_id,
            seq=message.seq,
            kind=enum_name(operations_pb2.OperationKind, message.kind),
            state=enum_name(operations_pb2.OperationState, message.state),
            error=from_status(message.error) if message.HasField("error") else None,
            created_at=to_datetime(message.created_at),
            finished_at=to_datetime(message.finished_at) if ended else None,
            queue_ms=message.queue_ms,
            compute_ms=message.compute_ms,
            fingerprint=message.fingerprint,
        )


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an artifact."""

    name: str
    size_bytes: int
    sha256: str = field(repr=False)


@dataclass(frozen=True)
class AdapterShape:
    """The shape of a LoRA adapter; `rank` 0 for one that was saved before shapes were kept."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class ArtifactInfo:
    """A saved checkpoint.

    Attributes:
        id: `art-…`.
        run_id: the run that was saved; empty for an adapter that was uploaded.
        model_ref: its base model.
        step: applied updates of the saved weights.
        size_bytes: sum of its files' sizes.
        sha256: over its files in name order, each as `<sha256>  <name>` and a newline.
        has_optimizer: whether it holds what continuing needs.
        metadata: the caller's own JSON object.
        created_at: when it was saved.
        files: its files, in name order.
        expires_at: when its time to live is over; None if it has none.
        adapter: its shape: what a run must have as `lora_config` to load it.
    """

    id: str
    run_id: str
    model_ref: str
    step: int
    size_bytes: int
    sha256: str
    has_optimizer: bool
    metadata: Mapping[str, Any]
    created_at: datetime
    files: tuple[ArtifactFile, ...]
    expires_at: datetime | None
    adapter: AdapterShape

    @classmethod
    def from_proto(cls, message: artifacts_pb2.Artifact) -> ArtifactInfo:
        """Unpacks an artifact."""
        return cls(
            id=message.id,
            run_id=message.run_id,
            model_ref=message.model_ref,
            step=message.step,
            size_bytes=message.size_bytes,
            sha256=message.sha256,
            has_optimizer=message.has_optimizer,
            metadata=to_dict(message.metadata),
            created_at=to_datetime(message.created_at),
            files=tuple(ArtifactFile(f.name, f.size_bytes, f.sha256) for f in message.files),
            expires_at=to_datetime(message.expires_at) if message.HasField("expires_at") else None,
            adapter=AdapterShape(
                rank=message.adapter.rank,
                alpha=message.adapter.alpha,
                dropout=message.adapter.dropout,
                target_modules=tuple(message.adapter.target_modules),
            ),
        )


@dataclass(frozen=True)
class ModelInfo:
    """A registered base model.

    Attributes:
        name: its registered name.
        references: other references that mean the same model.
        architecture: as in `transformers`, or "mock".
        parameters: number of parameters; 0 for the mock.
        vocabulary_size: token ids are below it; 0 if any is taken (mock).
        context_length: longest sequence, tokens; 0 if any is taken (mock).
        dtype: element type of the frozen weights.
        linear_modules: what LoRA can adapt: name → number of modules.
        has_chat_template: whether it has a chat template.
        tokenizer_sha256: over the tokenizer's files; empty without tokenizer.
        accepts_any_reference: the mock, which takes any model_ref and trains nothing.
    """

    name: str
    references: tuple[str, ...]
    architecture: str
    parameters: int
    vocabulary_size: int
    context_length: int
    dtype: str
    linear_modules: Mapping[str, int]
    has_chat_template: bool
    tokenizer_sha256: str
    accepts_any_reference: bool

    @classmethod
    def from_proto(cls, message: models_pb2.Model) -> ModelInfo:
        """Unpacks a model."""
        return cls(
            name=message.name,
            references=tuple(message.references),
            architecture=message.architecture,
            parameters=message.parameters,
            vocabulary_size=message.vocabulary_size,
            context_length=message.context_length,
            dtype=enum_name(types_pb2.DataType, message.dtype),
            linear_modules={module.name: module.count for module in message.linear_modules},
            has_chat_template=message.has_chat_template,
            tokenizer_sha256=message.tokenizer_sha256,
            accepts_any_reference=message.accepts_any_reference,
        )


@dataclass(frozen=True)
class TenantInfo:
    """Who owns runs, artifacts and keys."""

    id: str
    name: str
    created_at: datetime

    @classmethod
    def from_proto(cls, message: admin_pb2.Tenant) -> TenantInfo:
        """Unpacks a tenant."""
        return cls(message.id, message.name, to_datetime(message.created_at))


@dataclass(frozen=True)
class KeyInfo:
    """A credential, without its secret.

    Attributes:
        id: `key-…`.
        kind: "tenant", "admin" or "worker".
        tenant_id: its tenant; empty for admin and worker keys.
        name: free text for people.
        created_at: when it was created.
        revoked_at: when it was revoked; None if it works.
    """

    id: str
    kind: str
    tenant_id: str
    name: str
    created_at: datetime
    revoked_at: datetime | None

    @classmethod
    def from_proto(cls, message: admin_pb2.Key) -> KeyInfo:
        """Unpacks a key."""
        revoked = message.HasField("revoked_at")
        return cls(
            id=message.id,
            kind=enum_name(admin_pb2.KeyKind, message.kind),
            tenant_id=message.tenant_id,
            name=message.name,
            created_at=to_datetime(message.created_at),
            revoked_at=to_datetime(message.revoked_at) if revoked else None,
        )


@dataclass(frozen=True)
class StorageUse:
    """How many things of a kind are stored, and their size, bytes."""

    count: int
    size_bytes: int

    @classmethod
    def from_proto(cls, message: admin_pb2.StorageUse) -> StorageUse:
        """Unpacks a kind's use."""
        return cls(message.count, message.size_bytes)


@dataclass(frozen=True)
class StorageInfo:
    """What takes how much disk on the server.

    Attributes:
        log: the store's file; its count is of operations.
        log_free_bytes: what of the file is free to be used again, bytes.
        payloads: specs and results too big for a row.
        snapshots: recovery points of runs.
        artifacts: saved checkpoints.
        other: everything else in the blob store.
        damaged_snapshots: snapshots that were found damaged since the server started.
    """

    log: StorageUse
    log_free_bytes: int
    payloads: StorageUse
    snapshots: StorageUse
    artifacts: StorageUse
    other: StorageUse
    damaged_snapshots: int

    @classmethod
    def from_proto(cls, message: admin_pb2.GetStorageResponse) -> StorageInfo:
        """Unpacks the answer."""
        return cls(
            log=StorageUse.from_proto(message.log),
            log_free_bytes=message.log_free_bytes,
            payloads=StorageUse.from_proto(message.payloads),
            snapshots=StorageUse.from_proto(message.snapshots),
            artifacts=StorageUse.from_proto(message.artifacts),
            other=StorageUse.from_proto(message.other),
            damaged_snapshots=message.damaged_snapshots,
        )


@dataclass(frozen=True)
class NewKey:
    """A new credential; the server does not keep the secret."""

    key: KeyInfo
    secret: str = field(repr=False)
