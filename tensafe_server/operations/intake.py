"""Taking operations in: identity, idempotency, checks, limits, durability, order.

The part between looking a (run, seq) up and putting it into the run does not wait for anything, so
two calls with the same seq cannot both be first.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from google.rpc.status_pb2 import Status

from tensafe.v1 import training_pb2 as training
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe.v1.operations_pb2 import OPERATION_KIND_UNSPECIFIED as UNKNOWN_KIND
from tensafe.wire.channel import MAX_MESSAGE_BYTES
from tensafe.wire.status import TenSafeFault, to_status
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.events.hub import EventHub
from tensafe_server.ids import new_id
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations import checks
from tensafe_server.operations.artifacts import ArtifactBook, check_there
from tensafe_server.operations.gate import Gate
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.limits import RETRY_S, Admission, Limits
from tensafe_server.operations.model import FAILED, QUEUED, PendingOperation, RunState
from tensafe_server.operations.validation import check_rules
from tensafe_server.privacy.checks import check_private
from tensafe_server.privacy.config import PrivateConfigs
from tensafe_server.store.base import OperationRow, Store
from tensafe_server.unexpected import unexpected

log = logging.getLogger(__name__)

# Kinds that use an artifact beside or in place of a run's own weights.
_ON_ONE_MODEL = frozenset({"load_state", "forward", "forward_backward"})
_PROMPTS_AT_A_TIME = 4096


@dataclass(slots=True)
class Outcome:
    """What became of one submitted spec."""

    operation_id: str = ""
    error: Status | None = None
    repeated: bool = False


@dataclass(slots=True)
class _Candidate:
    spec: training.OperationSpec
    data: bytes
    digest: bytes
    artifact_id: str = ""
    artifact: Artifact | None = None
    seen: bool = False
    conflicts: bool = False
    by_request: bool = False
    fault: TenSafeFault | None = None
    full: TenSafeFault | None = None
    payload: tuple[bytes | None, str | None] = (None, None)


class Intake:
    """Accepts operations for tenants.

    Attributes:
        draining: set when nothing more is accepted: what to answer.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        models: ModelRegistry,
        payloads: Payloads,
        hub: EventHub,
        artifacts: ArtifactBook,
        limits: Limits,
        private: PrivateConfigs,
    ) -> None:
        self._private = private
        self._store = store
        self._ledger = ledger
        self._models = models
        self._payloads = payloads
        self._artifacts = artifacts
        self._admission = Admission(ledger, limits)
        self.draining: TenSafeFault | None = None
        self._gate = Gate(store, ledger, hub)

    async def submit(
        self, tenant_id: str, specs: Sequence[training.OperationSpec], session_id: str
    ) -> list[Outcome]:
        """Takes operations in and answers for each; what it accepted is on disk when it returns.

        Raises:
            TenSafeFault: DRAINING.
        """
        if self.draining is not None:
            raise self.draining
        outcomes: list[Outcome] = []
        full: dict[str, TenSafeFault] = {}  # by run: what follows a full queue must not overtake
        overtaken: dict[str, TenSafeFault] = {}  # by run: nor go on where another client is
        for turn in _turns(specs):
            outcomes += await self._take(tenant_id, turn, session_id, full, overtaken)
        return outcomes

    async def settled(self) -> None:
        """Returns when all that is accepted by now is queued, or could not be stored."""
        await self._gate.passed()
        await self._store.flushed()

    async def _take(
        self,
        tenant_id: str,
        specs: Sequence[training.OperationSpec],
        session_id: str,
        full: dict[str, TenSafeFault],
        overtaken: dict[str, TenSafeFault],
    ) -> list[Outcome]:
        candidates: list[_Candidate] = []
        accepted: list[PendingOperation] = []
        try:
            for spec in specs:
                candidates.append(await self._prepare(tenant_id, spec))  # noqa: PERF401 - kept if the caller goes
            return await self._take_prepared(
                tenant_id, candidates, accepted, session_id, full, overtaken
            )
        finally:
            await self._drop_unused(candidates, accepted)

    async def _drop_unused(
        self, candidates: Sequence[_Candidate], accepted: Sequence[PendingOperation]
    ) -> None:
        """What was stored of specs that were not accepted, or not for the first time."""
        stored = {key for candidate in candidates if (key := candidate.payload[1])}
        if stored:
            with suppress(OSError):  # the next start removes it
                await self._payloads.delete(
                    [*stored.difference(operation.row.spec_ref for operation in accepted)]
                )

    async def _take_prepared(
        self,
        tenant_id: str,
        candidates: Sequence[_Candidate],
        accepted: list[PendingOperation],
        session_id: str,
        full: dict[str, TenSafeFault],
        overtaken: dict[str, TenSafeFault],
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        repeated: list[tuple[Outcome, _Candidate]] = []
        for candidate in candidates:
            outcome = Outcome()
            outcomes.append(outcome)
            run_id = candidate.spec.run_id
            if candidate.spec.HasField("seq") and run_id in overtaken:
                outcome.error = to_status(overtaken[run_id].detail)
                continue
            candidate.full = full.get(run_id, candidate.full)
            try:
                pending = self._accept(tenant_id, candidate, session_id, outcome)
            except _SeenBeforeError:
                repeated.append((outcome, candidate))
                continue
            except TenSafeFault as fault:
                outcome.error = to_status(fault.detail)
                if candidate.spec.HasField("seq") and fault.detail.reason == "QUEUE_FULL":
                    full[run_id] = fault
                if candidate.spec.HasField("seq") and fault.detail.reason == "SEQ_CONFLICT":
                    overtaken[run_id] = fault
                continue
            if pending is not None:
                accepted.append(pending)
        if accepted:
            try:
                await self._gate.stored(accepted)
            except Exception:
                accepted.clear()
                raise
        for outcome, candidate in repeated:
            await self._answer_repeated(tenant_id, candidate, outcome)
        return outcomes

    async def _prepare(self, tenant_id: str, spec: training.OperationSpec) -> _Candidate:
        data = spec.SerializeToString(deterministic=True)
        candidate = _Candidate(spec, data, hashlib.blake2b(data, digest_size=16).digest())
        candidate.by_request = spec.HasField("request_id") and not checks.has_place(spec)
        try:
            checks.check_identity(spec)
            _check_spec(spec, len(data))
        except TenSafeFault as fault:
            candidate.fault = fault
            await asyncio.sleep(0)  # a thousand faulty ones shall not keep all others waiting
            return candidate
        candidate.artifact_id = _artifact_read(spec)
        if candidate.artifact_id:
            candidate.artifact = await self._store.artifact(tenant_id, candidate.artifact_id)
        elif spec.sample.weights.HasField("version"):
            run = self._ledger.find_run(tenant_id, spec.run_id)
            if run is not None:
                candidate.artifact = await self._store.artifact_at(
                    run.id, spec.sample.weights.version.step
                )
        if candidate.by_request:
            row = await self._store.operation_by_request(tenant_id, spec.request_id)
            candidate.seen = row is not None
        elif spec.HasField("seq"):
            candidate.conflicts = await self._conflicts(tenant_id, candidate)
        try:
            self._admission.check(tenant_id, len(data), ahead=False)
        except TenSafeFault as fault:
            candidate.full = fault  # unless it repeats one that was accepted: then it is not new
        else:
            candidate.payload = await self._payloads.save(tenant_id, data)
        return candidate

    async def _conflicts(self, tenant_id: str, candidate: _Candidate) -> bool:
        """Whether its seq was used before, for another operation that has ended."""
        spec = candidate.spec
        run = self._ledger.find_run(tenant_id, spec.run_id)
        if run is None or spec.seq >= run.next_seq or spec.seq in run.by_seq:
            return False
        row = await self._store.operation_by_seq(run.id, spec.seq)
        return row is not None and row.spec_hash != candidate.digest

    def _accept(
        self, tenant_id: str, candidate: _Candidate, session_id: str, outcome: Outcome
    ) -> PendingOperation | None:
        """Makes the operation, refused or queued; None if it is a repetition in memory.

        Raises:
            TenSafeFault: it is refused and leaves no record.
            _SeenBeforeError: the store has to be asked.
        """
        spec = candidate.spec
        if candidate.fault is not None and not checks.has_place(spec):
            # Without a place in an order it is on record by its request id, if that is right.
            checks.check_identity(spec)
            if not spec.WhichOneof("operation"):
                raise candidate.fault
        run = self._ledger.run(tenant_id, spec.run_id) if spec.HasField("run_id") else None
        if self._known(tenant_id, run, candidate, outcome):
            return None
        if run is not None and run.deleted:
            raise TenSafeFault(
                "RUN_DELETED",
                f"run {run.id} was deleted; create a new one",
                run_id=run.id,
            )
        if candidate.full is not None:
            raise candidate.full
        ahead = run is not None and spec.HasField("seq") and not _follows(run, spec.seq)
        if run is not None:
            self._admission.check_distance(run, spec.seq)
        self._admission.check(tenant_id, len(candidate.data), ahead=ahead)
        if candidate.artifact is not None:
            self._artifacts.check_open(candidate.artifact)
        created_ns = time.time_ns()
        row = OperationRow(
            id=new_id("op"),
            tenant_id=tenant_id,
            run_id=spec.run_id if run is not None else None,
            seq=spec.seq if spec.HasField("seq") else None,
            request_id=spec.request_id if candidate.by_request else None,
            session_id=session_id,
            kind=checks.KINDS.get(spec.WhichOneof("operation") or "", UNKNOWN_KIND),
            state=QUEUED,
            executed=False,
            spec_hash=candidate.digest,
            spec=candidate.payload[0],
            spec_ref=candidate.payload[1],
            artifact_id=_artifact_id(candidate),
            cost=0.0,
            created_ns=created_ns,
            spec_bytes=len(candidate.data),
        )
        if spec.HasField("time_to_live"):
            row.deadline_ns = created_ns + spec.time_to_live.ToNanoseconds()
        pending = PendingOperation(row, candidate.data, model="", ahead=ahead)
        outcome.operation_id = row.id
        try:
            pending.model, row.cost = self._check(candidate, run)
        except Exception as error:
            if not isinstance(error, TenSafeFault):
                # This one's alone: others of the call have their places already.
                error = unexpected(log, f"checking {row.id}", error)
            outcome.error = to_status(error.detail)
            row.state = FAILED
            row.error = outcome.error.SerializeToString()
            row.finished_ns = row.created_ns
            row.spec, row.spec_ref, row.spec_bytes, row.deadline_ns = None, None, 0, None
            pending.void = True
            pending.spec = None
        self._ledger.reserve(pending, run)
        return pending

    def _check(self, candidate: _Candidate, run: RunState | None) -> tuple[str, float]:
        spec = candidate.spec
        if candidate.fault is not None:
            raise candidate.fault
        if candidate.artifact_id and candidate.artifact is None:
            raise TenSafeFault(
                "ARTIFACT_NOT_FOUND",
                f"no artifact {candidate.artifact_id!r}; `tensafe artifacts list` shows yours",
                artifact_id=candidate.artifact_id,
            )
        if spec.sample.weights.HasField("version") and candidate.artifact is None:
            raise TenSafeFault(
                "VERSION_NOT_SAVED",
                f"run {spec.run_id} has no saved weights of step "
                f"{spec.sample.weights.version.step}; call save_state at that step",
                run_id=spec.run_id,
            )
        if candidate.artifact is not None:
            check_there(candidate.artifact)
            if run is not None and spec.WhichOneof("operation") in _ON_ONE_MODEL:
                self._check_model(candidate.artifact, run, spec.WhichOneof("operation") or "")
        if run is not None:
            reference, field = run.model, "run_id"
        elif candidate.artifact is not None:
            reference, field = candidate.artifact.model_ref, "sample.weights.artifact_id"
        else:
            reference, field = spec.sample.weights.base_model, "sample.weights.base_model"
        model = self._models.find(reference, field)
        private = run.private if run is not None else None
        losses = self._models.losses(model.name)
        cost = checks.check_content(spec, model, losses, private=private is not None)
        check_private(spec, private, spec.run_id)
        if run is not None and spec.HasField("private_step"):
            cost = checks.BACKWARD_FACTOR * self._private.expected_tokens(run)
        return model.name, cost

    def _check_model(self, artifact: Artifact, run: RunState, kind: str) -> None:
        field = f"{kind}.artifact_id" if kind == "load_state" else f"{kind}.loss.reference"
        name = self._models.find(artifact.model_ref, field).name
        if name != run.model:
            raise TenSafeFault(
                "ARTIFACT_MISMATCH",
                f"artifact {artifact.id} is an adapter of {artifact.model_ref}, run {run.id} is on "
                f"{run.config.model_ref}; it belongs to runs on its own model",
                field=field,
                artifact_id=artifact.id,
                run_id=run.id,
            )

    def _known(
        self, tenant_id: str, run: RunState | None, candidate: _Candidate, outcome: Outcome
    ) -> bool:
        spec = candidate.spec
        if candidate.by_request:
            pending = self._ledger.by_request(tenant_id, spec.request_id)
            if pending is None and candidate.seen:
                raise _SeenBeforeError
        else:
            assert run is not None
            if candidate.conflicts:
                raise _conflict(candidate)
            pending = run.by_seq.get(spec.seq)
            if pending is None and (spec.seq < run.next_seq or spec.seq in run.early):
                raise _SeenBeforeError
        if pending is None:
            return False
        if pending.row.spec_hash != candidate.digest:
            raise _conflict(candidate)
        raise _SeenBeforeError

    async def _answer_repeated(
        self, tenant_id: str, candidate: _Candidate, outcome: Outcome
    ) -> None:
        await self.settled()
        spec = candidate.spec
        if candidate.by_request:
            row = await self._store.operation_by_request(tenant_id, spec.request_id)
        else:
            row = await self._store.operation_by_seq(spec.run_id, spec.seq)
        if row is None:
            # Its first submission could not be written; that call was told so.
            fault = TenSafeFault(
                "QUEUE_FULL",
                "the first attempt was not stored; send it again",
                retry_delay_s=RETRY_S,
            )
            outcome.error = to_status(fault.detail)
        elif row.spec_hash != candidate.digest:
            outcome.error = to_status(_conflict(candidate).detail)
        else:
            outcome.operation_id = row.id
            outcome.repeated = True
            if row.state == FAILED and not row.executed and row.error is not None:
                outcome.error = Status.FromString(row.error)


def _turns(
    specs: Sequence[training.OperationSpec],
) -> Iterator[Sequence[training.OperationSpec]]:
    """Cuts a call where its prompts become many: between two turns others have theirs."""
    begin, prompts = 0, 0
    for index, spec in enumerate(specs):
        own = len(spec.sample.prompts)
        if prompts and prompts + own > _PROMPTS_AT_A_TIME:
            yield specs[begin:index]
            begin, prompts = index, 0
        prompts += own
    yield specs[begin:]


class _SeenBeforeError(Exception):
    """The (run, seq) or request id was used before."""


def _follows(run: RunState, seq: int) -> bool:
    """Whether nothing is missing before a seq."""
    if seq <= run.next_seq:
        return True
    before = run.by_seq.get(seq - 1)
    return before is not None and not before.ahead


def _check_spec(spec: training.OperationSpec, size: int) -> None:
    if size > MAX_MESSAGE_BYTES:
        raise TenSafeFault(
            "MESSAGE_TOO_LARGE",
            f"the operation has {size} bytes, the limit is {MAX_MESSAGE_BYTES}; split the batch "
            "over several calls",
            field="operation",
        )
    check_rules(spec, size=size)


def _artifact_id(candidate: _Candidate) -> str | None:
    if candidate.spec.HasField("save_state"):
        return new_id("art")
    return candidate.artifact.id if candidate.artifact is not None else None


def _artifact_read(spec: training.OperationSpec) -> str:
    if spec.HasField("load_state"):
        return spec.load_state.artifact_id
    if spec.HasField("sample"):
        return spec.sample.weights.artifact_id
    operation = spec.forward_backward if spec.HasField("forward_backward") else spec.forward
    return operation.loss.reference.artifact_id


def _conflict(candidate: _Candidate) -> TenSafeFault:
    spec = candidate.spec
    if candidate.by_request:
        return TenSafeFault(
            "REQUEST_ID_CONFLICT",
            f"request id {spec.request_id!r} was used for another operation; draw a new one",
            field="request_id",
        )
    return TenSafeFault(
        "SEQ_CONFLICT",
        f"seq {spec.seq} of run {spec.run_id} was used for another operation; AttachRun tells the "
        "next free one",
        field="seq",
        run_id=spec.run_id,
        seq=spec.seq,
    )
