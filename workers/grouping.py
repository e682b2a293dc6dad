"""Executes operations of different runs together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensafe.v1 import training_pb2, worker_pb2
from workers import wire
from workers.backend import Backend
from workers.execution import write_step
from workers.failures import applied, close_over
from workers.keeping import HeldRun
from workers.operations import LossOutcome, LossRequest, StepOutcome, StepRequest
from workers.outcome_size import check_size

log = logging.getLogger(__name__)

_SUMMARY_S = 60.0
_KINDS = frozenset({"forward_backward", "optim_step"})


@dataclass(slots=True)
class Member:
    """An operation that may be executed together with others.

    Attributes:
        request: what the backend is asked, once it was read.
        is_held: its run is here, and comes to this operation.
        outcome: what came of it.
        compute_ms: its share of the time.
    """

    planned: worker_pb2.PlannedOperation
    spec: training_pb2.OperationSpec
    kind: str
    request: LossRequest | StepRequest | None = None
    is_held: bool = False
    outcome: LossOutcome | StepOutcome | Exception | None = None
    compute_ms: float = 0.0

    @property
    def weight(self) -> float:
        """Its part of a pass, relative to the other members'."""
        if isinstance(self.request, LossRequest):
            return max(1, len(self.request.batch.input_tokens))
        return 1


def as_member(planned: worker_pb2.PlannedOperation, at_hand: Collection[str] = ()) -> Member | None:
    """The operation as a member of its group; None if it is executed by itself.

    One whose loss compares with an artifact that is not at hand goes by itself, so that those
    beside it wait for no transfer.
    """
    if planned.replay or planned.void or not planned.group:
        return None
    spec = training_pb2.OperationSpec.FromString(planned.spec)
    kind = spec.WhichOneof("operation") or ""
    reference = spec.forward_backward.loss.reference.artifact_id
    if reference and reference not in at_hand:
        return None
    return Member(planned, spec, kind) if kind in _KINDS else None


def passes(members: Iterable[Member], runs: Mapping[str, HeldRun]) -> list[list[Member]]:
    """Divides a group's members into what can be executed together: one kind, one model, each run
    once; gradients of a deterministic run, and what belongs to no run that is held, alone."""
    found: list[list[Member]] = []
    open_passes: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        run = runs.get(member.spec.run_id)
        if run is None or (run.deterministic and member.kind == "forward_backward"):
            found.append([member])
            continue
        key = (member.kind, run.model_ref)
        joined = open_passes.get(key)
        if joined is None or any(each.spec.run_id == member.spec.run_id for each in joined):
            joined = open_passes[key] = []
            found.append(joined)
        joined.append(member)
    return found


def execute(backend: Backend, members: Sequence[Member]) -> None:
    """Executes members that have a request as one pass, and fills in their outcomes."""
    begin = time.perf_counter()
    outcomes: Sequence[LossOutcome | StepOutcome | Exception]
    try:
        if isinstance(members[0].request, LossRequest):
            outcomes = backend.forward_backward_group(
                [
                    (member.spec.run_id, member.spec.seq, member.request)
                    for member in members
                    if isinstance(member.request, LossRequest)
                ]
            )
        else:
            outcomes = backend.optim_step_group(
                [
                    (member.spec.run_id, member.request)
                    for member in members
                    if isinstance(member.request, StepRequest)
                ]
            )
    except Exception as error:
        outcomes = [error] * len(members)
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    total = sum(member.weight for member in members)
    for member, outcome in zip(members, outcomes, strict=True):
        member.outcome = outcome
        member.compute_ms = elapsed_ms * member.weight / total


def read_request(member: Member, artifact_directory: Callable[[str], Path]) -> None:
    """Reads what the backend is asked.

    Raises:
        TenSafeFault: INVALID_BATCH, or what else is wrong with it.
    """
    if member.kind == "optim_step":
        member.request = wire.step_request(member.planned, member.spec.optim_step)
    else:
        member.request = wire.gradient_request(
            member.planned, member.spec.forward_backward, artifact_directory
        )


def write_outcome(backend: Backend, member: Member, done: worker_pb2.OperationDone) -> None:
    """Fills in the result. Raises the member's failure, with its window as after that.

    Raises:
        RunLostError: its run is not as the log would have it.
    """
    outcome = member.outcome
    run_id = member.spec.run_id
    if isinstance(outcome, Exception):
        if member.is_held:
            close_over(backend, member.kind, member.planned, run_id, outcome)
        raise outcome
    with applied(run_id):
        if isinstance(outcome, LossOutcome):
            done.result.CopyFrom(wire.forward_backward_result(outcome))
            check_size(done)
        elif outcome is not None:
            write_step(member.planned, outcome, done)


class PassCount:
    """Counts how operations were grouped, and says so in the log once a minute and at the end."""

    def __init__(self) -> None:
        self.operations = 0
        self.passes = 0
        self.largest = 0
        self._since_s = time.monotonic()

    def add(self, operations: int) -> None:
        """Counts a pass of more than one run."""
        self.operations += operations
        self.passes += 1
        self.largest = max(self.largest, operations)
        if time.monotonic() - self._since_s > _SUMMARY_S:
            self.tell()

    def tell(self) -> None:
        """Writes what came together since the last time to the log."""
        if self.passes:
            log.info(
                "%d operations of several runs in %d passes, at most %d in one",
                *(self.operations, self.passes, self.largest),
            )
        self.operations = self.passes = self.largest = 0
        self._since_s = time.monotonic()
