"""The submitter: whatever waits while one batch is in flight goes into the next.

No timer and no task per operation: callers append to a deque, and wake the loop once for all that
wait. A batch whose answer was lost is sent again byte for byte, under the same (run, seq).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from tensafe.v1 import training_pb2 as pb
from tensafe.wire.channel import MAX_MESSAGE_BYTES
from tensafe_client.backoff import Backoff, asks_for_retry, retryable
from tensafe_client.errors import (
    MessageTooLargeError,
    SequenceConflictError,
    TenSafeError,
    from_rpc_error,
    from_status,
    unexpected,
)
from tensafe_client.futures import OperationFuture

if TYPE_CHECKING:
    from tensafe_client.session import Session

MAX_OPERATIONS = 256
MAX_BATCH_BYTES = 3 * 2**20
_INTERNAL_ATTEMPTS = 5
_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_ENVELOPE_BYTES = 128  # session id, tags and lengths around the operations


class Submission(NamedTuple):
    """One operation on its way: its serialized OperationSpec, and who waits for it."""

    spec: bytes
    future: OperationFuture[Any]


def check_size(kind: str, size_bytes: int) -> None:
    """Refuses an operation that the server would not take.

    Raises:
        MessageTooLargeError: naming size, limit and remedy.
    """
    if size_bytes + _ENVELOPE_BYTES > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"this {kind} is {size_bytes:,} bytes; the limit is {MAX_MESSAGE_BYTES:,} bytes",
            reason="MESSAGE_TOO_LARGE",
            metadata={"size_bytes": str(size_bytes), "limit_bytes": str(MAX_MESSAGE_BYTES)},
            remedy="split it: the gradients of several forward_backward calls before one "
            "optim_step add up",
        )


class Submitter:
    """Sends the operations of one session, in the order in which they were put."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: deque[Submission] = deque()
        self._wake = asyncio.Event()
        self._woken = False
        self._sending: list[Submission] | None = None
        self._progress = asyncio.Event()
        self._backoff = Backoff()
        # Put back in the midst of a call, which may have reached the server.
        self._unsure: set[int] = set()
        # How many operations go into a batch: few while the server's queue is full, so that what it
        # refuses is not sent to it over and over.
        self._window = MAX_OPERATIONS

    def put(self, submission: Submission) -> None:
        """Queues an operation; from any thread, never blocks."""
        self._waiting.append(submission)
        if not self._woken:
            # Two threads may both get here; a second wake-up is harmless.
            self._woken = True
            self._session.io.loop.call_soon_threadsafe(self._wake.set)

    async def run(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Sends until cancelled.

        Args:
            ready: awaited before each batch: returns once the session watches its operations.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._woken = False
            while self._waiting:
                batch = self._take()
                self._sending = batch
                try:
                    await ready()
                    await self._send(batch)
                except TenSafeError as error:
                    self._fail(batch, error)
                except Exception as error:  # the next batch is sent all the same
                    self._fail(batch, unexpected("sending operations", error))
                except asyncio.CancelledError:
                    self._waiting.extendleft(reversed(batch))
                    self._unsure.update(id(submission.future) for submission in batch)
                    raise
                finally:
                    self._session.operations.batch_answered()
                    self._sending = None
                    self._progress.set()

    async def flush(self) -> None:
        """Returns once everything put before has been answered."""
        while self._waiting or self._sending:
            self._progress.clear()
            await self._progress.wait()

    async def answered(self) -> None:
        """Returns once the batch that is being sent, if one is, has been answered."""
        batch = self._sending
        while batch is not None and self._sending is batch:
            self._progress.clear()
            await self._progress.wait()

    def fail_all(self, error: TenSafeError) -> None:
        """Ends everything that still waits; on the loop."""
        waiting: list[Submission] = []
        while self._waiting:
            waiting.append(self._waiting.popleft())
        self._fail(waiting, error)

    def take_out(self, run_id: str) -> list[Submission]:
        """Takes out a run's numbered operations that still wait; on the loop."""
        # Other threads append meanwhile, and a deque must not be iterated then.
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        out = [one for one in waiting if one.future.seq and one.future.run_id == run_id]
        taken = {id(one) for one in out}
        self._waiting.extendleft(one for one in reversed(waiting) if id(one) not in taken)
        return out

    def _take(self) -> list[Submission]:
        batch = [self._waiting.popleft()]
        size = len(batch[0].spec)
        while self._waiting and len(batch) < self._window:
            size += len(self._waiting[0].spec)
            if size > MAX_BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _send(self, batch: list[Submission]) -> None:
        response, calls = await self._call(_serialize(batch, self._session.session_id))
        if len(response.outcomes) != len(batch):
            raise TenSafeError(
                f"the server answered {len(response.outcomes)} outcomes for {len(batch)} operations"
            )
        again: list[Submission] = []
        delay_s: float | None = None
        for submission, outcome in zip(batch, response.outcomes, strict=True):
            future = submission.future
            unsure = calls > 1 or id(future) in self._unsure
            self._unsure.discard(id(future))
            if outcome.repeated and not unsure and future.seq:
                self._session.operations.overtaken(future, _taken(future))
                continue
            if not outcome.HasField("error"):
                self._session.operations.accepted(future, outcome)
                continue
            error = from_status(outcome.error)
            if isinstance(error, SequenceConflictError):
                self._session.operations.overtaken(future, error)
            elif asks_for_retry(error) and not self._session.operations.is_behind_lost(future):
                again.append(submission)
                delay_s = max(delay_s or 0.0, error.retry_delay_s or 0.0)
            else:
                self._session.operations.refused(future, outcome.operation_id, error)
        taken = len(batch) - len(again)
        if taken:
            self._backoff.reset()
        if again:
            self._window = max(1, min(MAX_OPERATIONS, 2 * taken))
            self._waiting.extendleft(reversed(again))
            await asyncio.sleep(self._backoff.next_s(delay_s))
        else:
            self._window = min(MAX_OPERATIONS, 2 * self._window)

    async def _call(self, request: bytes) -> tuple[pb.SubmitBatchResponse, int]:
        """Repeats the call until the server has answered it; an outage only makes it wait.

        A fault of the server may pass, and repeating is safe: that is tried a few times.

        Returns:
            The answer, and how many calls it took.
        """
        backoff = Backoff()
        faults = calls = 0
        while True:
            calls += 1
            try:
                return await self._session.submit_batch(request), calls
            except grpc.aio.AioRpcError as error:
                again = retryable(error) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if error.code() in _FAULTS:
                    faults += 1
                    again = faults < _INTERNAL_ATTEMPTS
                if not again:
                    raise from_rpc_error(error) from None
                delay_s = from_rpc_error(error).retry_delay_s
            await asyncio.sleep(backoff.next_s(delay_s))

    def _fail(self, batch: list[Submission], error: TenSafeError) -> None:
        for run_id in {one.future.run_id for one in batch if one.future.seq}:
            self._session.operations.run_lost(run_id, error)
        for submission in batch:
            self._session.operations.refused(submission.future, "", error)


def _taken(future: OperationFuture[Any]) -> SequenceConflictError:
    """What was never sent before cannot be a repetition of ours, however alike the two are."""
    return SequenceConflictError(
        f"seq {future.seq} of run {future.run_id} was used by another client, for an operation "
        "with the same content",
        reason="SEQ_CONFLICT",
        metadata={"run_id": future.run_id or "", "seq": str(future.seq)},
    )


def _serialize(batch: list[Submission], session_id: str) -> bytes:
    """Joins serialized OperationSpecs into a SubmitStreamRequest without parsing or copying twice.

    In protobuf's wire format a message in another, or in a list of it, is its tag, its length and
    its bytes; field 1 of wire type 2 has the tag 0x0A.
    """
    parts: list[bytes] = []
    for submission in batch:
        parts += (b"\x0a", _varint(len(submission.spec)), submission.spec)
    parts.append(pb.SubmitBatchRequest(session_id=session_id).SerializeToString())
    return b"".join((b"\x0a", _varint(sum(map(len, parts))), *parts))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
