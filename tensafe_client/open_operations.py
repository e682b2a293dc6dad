"""A session's operations that have not ended: who waits for each, and how it ends.

The submitter tells what the server took, the watcher what has ended. An operation in a run's order
is known by its seq, any other by its id. Everything marked "on the loop" runs on the process's I/O
loop; the rest may be called from any thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from tensafe.v1 import operations_pb2, training_pb2
from tensafe_client.errors import (
    OperationLostError,
    SequenceConflictError,
    SequenceGapError,
    TenSafeError,
)
from tensafe_client.futures import OperationFuture
from tensafe_client.sequence import RunSequence
from tensafe_client.submission import Submission

Future = OperationFuture[Any]


class OpenOperations:
    """Those of one session.

    Args:
        take_out: takes a run's numbered operations out of what waits to be sent.
        wait_for: resolves a future whose end the session's stream may not tell, in the background.

    Attributes:
        sequences: the numbering of each run that the session has operations of.
    """

    def __init__(
        self,
        take_out: Callable[[str], Iterable[Submission]],
        wait_for: Callable[[Future, str], None],
    ) -> None:
        self._take_out = take_out
        self._wait_for = wait_for
        self.sequences: dict[str, RunSequence] = {}
        self._by_place: dict[tuple[str, int], Future] = {}
        self._by_id: dict[str, Future] = {}
        # Ends of operations without seq that came before the answer that tells their ids.
        self._early: dict[str, operations_pb2.Operation] = {}
        self._submitting = False
        self._awaiting_id: dict[Future, list[asyncio.Event]] = {}

    def sequence(self, run: training_pb2.Run) -> RunSequence:
        """Returns the numbering of a run, brought up to what the server says."""
        known = self.sequences.setdefault(run.id, RunSequence(run.id, run.next_seq, run.step))
        with known.lock:
            known.step = run.step
            in_flight = self.has_pending(run.id)
            if known.lost is not None or not in_flight:
                known.next_seq, known.lost = run.next_seq, None
                known.accepted_seq = min(known.accepted_seq, run.next_seq - 1)
            else:
                known.next_seq = max(run.next_seq, known.next_seq)
        return known

    def add(self, future: Future) -> None:
        """One that has its seq."""
        self._by_place[future.run_id, future.seq] = future

    def follow(self, future: Future) -> None:
        """Keeps a rebuilt handle, so that it ends with the session at the latest; on the loop."""
        if future.operation_id is not None:
            self._by_id[future.operation_id] = future

    def has_pending(self, run_id: str) -> bool:
        """Tells whether numbered operations of the run have not ended yet."""
        return any(pending == run_id for pending, _ in list(self._by_place))

    def has_lost(self, run_id: str) -> bool:
        """Whether the server may never have seen some of the run's seqs."""
        sequence = self.sequences.get(run_id)
        return sequence is not None and sequence.lost is not None

    def is_behind_lost(self, future: Future) -> bool:
        """Whether earlier operations of its run are lost, so that it is not to be sent again."""
        return bool(future.seq) and self.has_lost(future.run_id)

    def acknowledged(self) -> list[Future]:
        """Those that the server has taken. Of the others, the submitter's answer will come."""
        open_ones = [*self._by_place.values(), *self._by_id.values()]
        return [future for future in open_ones if future.operation_id is not None]

    async def identified(self, future: Future) -> str | None:
        """Waits until the submission was answered, and tells the operation's id; None if it was
        refused; on the loop."""
        while future.operation_id is None and not future.done():
            told = asyncio.Event()
            self._awaiting_id.setdefault(future, []).append(told)
            await told.wait()
        return future.operation_id

    # -- what becomes of them; on the loop

    def submitting(self) -> None:
        """A batch is on its way: ends may come before the answer that tells whose they are."""
        self._submitting = True

    def batch_answered(self) -> None:
        """All ids of what was submitted are known: an unknown end is nobody's."""
        self._submitting = False
        self._early.clear()

    def accepted(self, future: Future, outcome: training_pb2.SubmitOutcome) -> None:
        """The server has the operation on disk."""
        operation_id = outcome.operation_id
        future._identify(operation_id)
        sequence = self.sequences.get(future.run_id)
        if sequence is not None:
            sequence.accepted_seq = max(sequence.accepted_seq, future.seq)
        if outcome.repeated and not future.done():
            self._wait_for(future, operation_id)
        if not future.seq and not future.done():
            early = self._early.pop(operation_id, None)
            if early is not None:
                self._finish(future, early)
            else:
                self._by_id[operation_id] = future
        self._tell_id(future)

    def refused(self, future: Future, operation_id: str, error: TenSafeError) -> None:
        """The server, or this side, has refused the operation."""
        future._identify(operation_id)
        self._by_place.pop((future.run_id, future.seq), None)
        future._fail(error)
        self._tell_id(future)

    def overtaken(self, future: Future, error: SequenceConflictError) -> None:
        """Another client has driven the run on. What would come after belongs to an order that is
        not the run's any more, and is not sent."""
        self.refused(future, "", error)
        self.run_lost(future.run_id or "", error)

    def lost(self, future: Future) -> None:
        """The server had taken the operation and does not have it any more."""
        self._by_id.pop(future.operation_id or "", None)
        place = f" (seq {future.seq} of {future.run_id})" if future.seq else ""
        error = lost_error(f"operation {future.operation_id}{place}")
        if not future.done():
            self.refused(future, "", error)
        if future.seq:
            self.run_lost(future.run_id, error)

    def run_lost(self, run_id: str, error: TenSafeError) -> None:
        """The server may never have seen some seqs of a run: ends what would wait for them."""
        sequence = self.sequences.get(run_id)
        if sequence is None:
            return
        with sequence.lock:
            sequence.lost = error
            later = [submission.future for submission in self._take_out(run_id)]
            later += sequence.drop()
        for future in later:
            self.refused(future, "", gap_error(run_id, error))

    def finished(self, operation: operations_pb2.Operation) -> None:
        """An operation of this session has ended."""
        seq = operation.seq
        if seq:
            future = self._by_place.pop((operation.run_id, seq), None)
            if future is not None and future.operation_id not in (None, operation.id):
                self.lost(future)  # and its seq was used again
                return
        else:
            future = self._by_id.pop(operation.id, None)
            if future is None and self._submitting:
                self._early[operation.id] = operation
        if future is not None:
            self._finish(future, operation)

    def ended(self, future: Future, operation: operations_pb2.Operation) -> None:
        """The operation of this future has ended, as another call than the stream tells."""
        future._finish(operation)
        self.finished(operation)

    def fail_all(self, error: TenSafeError) -> None:
        """Ends every open future, since nothing would resolve it any more."""
        for future in [*self._by_place.values(), *self._by_id.values()]:
            future._fail(error)
            self._tell_id(future)
        self._by_place.clear()
        self._by_id.clear()

    def _finish(self, future: Future, operation: operations_pb2.Operation) -> None:
        if operation.state == operations_pb2.OPERATION_STATE_SUCCEEDED:
            self._note_step(operation)  # before anyone is woken who might read it
        try:
            future._finish(operation)
        except Exception as error:  # one bad message must not end the stream
            future._fail(TenSafeError(f"the end of {operation.id} cannot be read: {error!r}"))
        if self._awaiting_id:
            self._tell_id(future)

    def _note_step(self, operation: operations_pb2.Operation) -> None:
        if operation.result.HasField("optim_step"):  # of a private step, too
            step = operation.result.optim_step.step
        elif operation.result.HasField("load_state"):
            step = operation.result.load_state.step
        else:
            return
        sequence = self.sequences.get(operation.run_id)
        if sequence is not None:
            sequence.step = step

    def _tell_id(self, future: Future) -> None:
        for told in self._awaiting_id.pop(future, ()):
            told.set()


def gap_error(run_id: str, cause: TenSafeError) -> TenSafeError:
    """Why an operation behind one that is lost was not sent."""
    error: TenSafeError
    if isinstance(cause, SequenceConflictError):
        error = SequenceConflictError(
            f"another client has driven run {run_id} on ({cause.message}), so that this operation "
            "was not sent",
            reason=cause.reason,
            code=cause.code,
            metadata={"run_id": run_id},
        )
    else:
        error = SequenceGapError(
            f"earlier operations of {run_id} did not reach the server ({cause.message}), so that "
            "this one was not sent",
            metadata={"run_id": run_id},
        )
    error.__cause__ = cause
    return error


def lost_error(what: str) -> OperationLostError:
    """What the server had taken is gone."""
    return OperationLostError(
        f"{what} was accepted, and the server does not have it any more: since it was started "
        "anew, what was last written to its disk is missing"
    )
