"""The core of a client: one channel, one session id, one submitter and one watch stream.

Everything marked "on the loop" runs on the process's I/O loop; the rest may be called from any
thread. The sync and the asyncio faces are both thin over this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from tensafe.v1 import operations_pb2, training_pb2
from tensafe.wire.tensors import Array
from tensafe_client import specs
from tensafe_client.backoff import Backoff
from tensafe_client.channel import Channel, Stubs
from tensafe_client.connection import Connection
from tensafe_client.errors import (
    ClientClosedError,
    ConnectionFailedError,
    OperationLostError,
    OperationNotFoundError,
    RequestTimeoutError,
    RunNotFoundError,
    SequenceConflictError,
    SequenceGapError,
    TenSafeError,
    unexpected,
)
from tensafe_client.futures import OperationFuture
from tensafe_client.io_loop import io_loop
from tensafe_client.sequence import Place, RunSequence
from tensafe_client.submission import Submission, Submitter, check_size
from tensafe_client.submit_stream import SubmitStream
from tensafe_client.watching import Watcher

_Ask = Callable[[Any], Coroutine[Any, Any, Any]]

_WAIT_S = 60.0
_ASKED_AT_ONCE = 64


class Session:
    """One client's connection to a coordinator."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.io = io_loop()
        self.session_id = f"ses-{secrets.token_hex(12)}"
        self.watch_error: TenSafeError | None = None
        self._closed = False
        self._channel = Channel(connection, self.check_open)
        self.metadata = self._channel.metadata
        self._stream = SubmitStream(self.metadata, connection.timeout_s)
        self._submitter = Submitter(self)
        self._watcher = Watcher(self)
        self._sender: asyncio.Task[None] | None = None
        self._sequences: dict[str, RunSequence] = {}
        self._by_place: dict[tuple[str, int], OperationFuture[Any]] = {}
        self._by_id: dict[str, OperationFuture[Any]] = {}
        # Ends of operations without seq that came before the answer that tells their ids.
        self._early: dict[str, operations_pb2.Operation] = {}
        self._submitting = False
        self._awaiting_id: dict[OperationFuture[Any], list[asyncio.Event]] = {}
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._makers: set[asyncio.Task[None]] = set()

    # -- calls

    async def stubs(self) -> Stubs:
        """Returns the stubs of a channel that was connected at least once; on the loop.

        Raises:
            ConnectionFailedError: if nothing answers in time.
        """
        self.io.at_exit(self.close)
        return await self._channel.stubs()

    async def call(self, method: Any, request: Any, *, timeout_s: float | None = None) -> Any:
        """Makes one unary call, repeated while that may help; see `Channel.call`; on the loop."""
        return await self._channel.call(method, request, timeout_s=timeout_s)

    async def submit_batch(self, request: bytes) -> training_pb2.SubmitBatchResponse:
        """Sends a serialized SubmitStreamRequest, once; on the loop."""
        stubs = await self.stubs()
        self._submitting = True
        return await self._stream.send(stubs, request)

    def spawn(self, coroutine: Any) -> None:
        """Runs a background task that ends with the session; on the loop."""
        task = self.io.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- operations

    def sequence(self, run: training_pb2.Run) -> RunSequence:
        """Returns the numbering of a run, brought up to what the server says."""
        known = self._sequences.setdefault(run.id, RunSequence(run.id, run.next_seq, run.step))
        with known.lock:
            known.step = run.step
            in_flight = self.has_pending(run.id)
            if known.lost is not None or not in_flight:
                known.next_seq, known.lost = run.next_seq, None
                known.accepted_seq = min(known.accepted_seq, run.next_seq - 1)
            else:
                known.next_seq = max(run.next_seq, known.next_seq)
        return known

    async def answered(self, run_id: str) -> None:
        """Returns once nothing is on its way to the server of what was numbered before a run lost
        seqs: it would be taken in among what is numbered after that; on the loop.

        Raises:
            ConnectionFailedError: if that takes too long.
        """
        if not self._is_lost(run_id):
            return
        try:
            async with asyncio.timeout(self.connection.timeout_s):
                await self._submitter.answered()
        except TimeoutError:
            raise self._channel.unreachable("to take what was being sent") from None

    def is_behind_lost(self, future: OperationFuture[Any]) -> bool:
        """Whether earlier operations of its run are lost, so that it is not to be sent again."""
        return bool(future.seq) and self._is_lost(future.run_id)

    def _is_lost(self, run_id: str) -> bool:
        sequence = self._sequences.get(run_id)
        return sequence is not None and sequence.lost is not None

    def has_pending(self, run_id: str) -> bool:
        """Tells whether numbered operations of the run have not ended yet."""
        return any(pending == run_id for pending, _ in list(self._by_place))

    def submit_numbered(
        self,
        sequence: RunSequence,
        kind: str,
        spec: training_pb2.OperationSpec,
        offsets: Array | None = None,
    ) -> OperationFuture[Any]:
        """Gives an operation its seq and queues it; never blocks on the network.

        Raises:
            MessageTooLargeError: if it is too large; it takes no seq.
            SequenceGapError: if earlier operations of the run were lost.
        """
        self.check_open()
        with sequence.lock:
            return self._submit_numbered(sequence, kind, spec, offsets)

    def submit_before_place(
        self,
        sequence: RunSequence,
        kind: str,
        spec: training_pb2.OperationSpec,
        next_kind: str,
        offsets: Array | None = None,
    ) -> tuple[OperationFuture[Any], Place]:
        """As `submit_numbered`, and keeps the place after it for an operation that is made from
        its result: `fill` gives it that. What is submitted meanwhile waits here, in order."""
        self.check_open()
        with sequence.lock:
            first = self._submit_numbered(sequence, kind, spec, offsets)
            seq = sequence.next_seq
            sequence.next_seq = seq + 1
            future: OperationFuture[Any] = OperationFuture(
                self, next_kind, sequence.run_id, seq, offsets
            )
            self._by_place[sequence.run_id, seq] = future
            return first, sequence.keep(future)

    def fill(self, sequence: RunSequence, place: Place, spec: training_pb2.OperationSpec) -> bool:
        """Gives a place its operation; False if it has one already, or is lost."""
        with sequence.lock:
            if self._closed or not sequence.is_open(place):
                return False
            spec.seq = place.future.seq
            submission = Submission(spec.SerializeToString(), place.future)
            sequence.fill(place, submission, self._put)
            return True

    def make(self, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs what will fill a place, on the loop; from any thread. `close` waits for it."""

        def start() -> None:
            task = self.io.loop.create_task(coroutine())
            self._makers.add(task)
            task.add_done_callback(self._makers.discard)

        self.io.loop.call_soon_threadsafe(start)

    def _submit_numbered(
        self,
        sequence: RunSequence,
        kind: str,
        spec: training_pb2.OperationSpec,
        offsets: Array | None,
    ) -> OperationFuture[Any]:
        if sequence.lost is not None:
            raise _gap(sequence.run_id, sequence.lost)
        seq = sequence.next_seq
        spec.seq = seq
        data = spec.SerializeToString()
        check_size(kind, len(data))
        sequence.next_seq = seq + 1
        future: OperationFuture[Any] = OperationFuture(self, kind, sequence.run_id, seq, offsets)
        self._by_place[sequence.run_id, seq] = future
        sequence.put(Submission(data, future), self._put)
        return future

    def submit_unnumbered(
        self, kind: str, spec: training_pb2.OperationSpec
    ) -> OperationFuture[Any]:
        """Queues an operation that has no place in a run's order."""
        self.check_open()
        spec.request_id = new_request_id()
        data = spec.SerializeToString()
        check_size(kind, len(data))
        future: OperationFuture[Any] = OperationFuture(self, kind, spec.run_id, 0)
        self._put(Submission(data, future))
        return future

    async def cancel_operation(self, future: OperationFuture[Any]) -> bool:
        """Cancels an operation, also one that still waits to be sent; on the loop.

        Its seq is taken, so it is always submitted first; one that is still being made is submitted
        without content there, and so poisons its window as every cancelled one does.
        """
        if self._cancel_unmade(future):
            return True
        try:
            async with asyncio.timeout(self.connection.timeout_s):
                operation_id = await self.identified(future)
        except TimeoutError:
            raise self._channel.unreachable(
                "to take the operation that is to be cancelled"
            ) from None
        if operation_id is None:
            return future.cancelled()
        stubs = await self.stubs()
        response = await self.call(
            stubs.operations.CancelOperation,
            operations_pb2.CancelOperationRequest(
                operation_id=operation_id, request_id=new_request_id()
            ),
        )
        if response.operation.state == operations_pb2.OPERATION_STATE_CANCELLED:
            self.ended(future, response.operation)
        return future.cancelled()

    async def is_running(self, operation_id: str) -> bool:
        """Whether a worker executes an operation now; on the loop."""
        stubs = await self.stubs()
        request = operations_pb2.GetOperationRequest(operation_id=operation_id)
        response = await self.call(stubs.operations.GetOperation, request)
        running: bool = response.operation.state == operations_pb2.OPERATION_STATE_RUNNING
        return running

    def _cancel_unmade(self, future: OperationFuture[Any]) -> bool:
        sequence = self._sequences.get(future.run_id)
        if sequence is None:
            return False
        with sequence.lock:
            place = sequence.open_place(future)
        if place is None or not self.fill(
            sequence, place, specs.refused_forward_backward(future.run_id)
        ):
            return False
        future._cancel_here()
        return True

    async def identified(self, future: OperationFuture[Any]) -> str | None:
        """Waits until the submission was answered, and tells the operation's id; None if it was
        refused; on the loop."""
        while future.operation_id is None and not future.done():
            told = asyncio.Event()
            self._awaiting_id.setdefault(future, []).append(told)
            await told.wait()
        return future.operation_id

    def follow(self, future: OperationFuture[Any]) -> None:
        """Keeps a rebuilt handle, so that it ends with the session at the latest; on the loop."""
        if future.operation_id is not None:
            self._by_id[future.operation_id] = future

    async def wait_for(self, future: OperationFuture[Any], operation_id: str) -> None:
        """Resolves a future whose end this session's stream may not tell; on the loop."""
        try:
            await self._wait_for(future, operation_id)
        except OperationNotFoundError:  # it was there
            self._lose(future)
        except TenSafeError as error:
            future._fail(error)
        except Exception as error:  # nobody else would end it
            future._fail(unexpected(f"waiting for {operation_id}", error))

    async def _wait_for(self, future: OperationFuture[Any], operation_id: str) -> None:
        stubs = await self.stubs()
        request = operations_pb2.WaitOperationRequest(
            operation_id=operation_id, timeout=Duration(seconds=int(_WAIT_S))
        )
        limit_s = _WAIT_S + self.connection.timeout_s
        backoff = Backoff()
        while not future.done():
            try:
                response = await self.call(
                    stubs.operations.WaitOperation, request, timeout_s=limit_s
                )
                backoff.reset()
                future._finish(response.operation)
            except (ConnectionFailedError, RequestTimeoutError):
                await asyncio.sleep(backoff.next_s())  # an outage only makes the future wait

    # -- what the submitter and the watcher report; on the loop

    def accepted(self, future: OperationFuture[Any], outcome: training_pb2.SubmitOutcome) -> None:
        """The server has the operation on disk."""
        operation_id = outcome.operation_id
        future._identify(operation_id)
        sequence = self._sequences.get(future.run_id)
        if sequence is not None:
            sequence.accepted_seq = max(sequence.accepted_seq, future.seq)
        if outcome.repeated and not future.done():
            self.spawn(self.wait_for(future, operation_id))
        if not future.seq and not future.done():
            early = self._early.pop(operation_id, None)
            if early is not None:
                self._finish(future, early)
            else:
                self._by_id[operation_id] = future
        self._tell_id(future)

    def refused(self, future: OperationFuture[Any], operation_id: str, error: TenSafeError) -> None:
        """The server, or this side, has refused the operation."""
        future._identify(operation_id)
        self._by_place.pop((future.run_id, future.seq), None)
        future._fail(error)
        self._tell_id(future)

    def lost(self, run_id: str, error: TenSafeError) -> None:
        """The server may never have seen some seqs of a run: ends what would wait for them."""
        sequence = self._sequences.get(run_id)
        if sequence is None:
            return
        with sequence.lock:
            sequence.lost = error
            later = [submission.future for submission in self._submitter.take_out(run_id)]
            later += sequence.drop()
        for future in later:
            self.refused(future, "", _gap(run_id, error))

    def overtaken(self, future: OperationFuture[Any], error: SequenceConflictError) -> None:
        """Another client has driven the run on. What would come after belongs to an order that is
        not the run's any more, and is not sent."""
        self.refused(future, "", error)
        self.lost(future.run_id or "", error)

    def batch_answered(self) -> None:
        """All ids of what was submitted are known: an unknown end is nobody's."""
        self._submitting = False
        self._early.clear()

    def finished(self, operation: operations_pb2.Operation) -> None:
        """An operation of this session has ended."""
        seq = operation.seq
        if seq:
            future = self._by_place.pop((operation.run_id, seq), None)
            if future is not None and future.operation_id not in (None, operation.id):
                self._lose(future)  # and its seq was used again
                return
        else:
            future = self._by_id.pop(operation.id, None)
            if future is None and self._submitting:
                self._early[operation.id] = operation
        if future is not None:
            self._finish(future, operation)

    def ended(self, future: OperationFuture[Any], operation: operations_pb2.Operation) -> None:
        """The operation of this future has ended, as another call than the stream tells."""
        future._finish(operation)
        self.finished(operation)

    async def reconcile(self) -> None:
        """Reads every open operation anew, after the stream lost its place."""
        await self._read_all(self._acknowledged())

    async def find_lost(self) -> None:
        """Ends what the server, started anew, had accepted and does not have any more. A run of
        which it cannot say is asked for again, and holds up nothing else."""
        run_ids = list(self._sequences)
        others = [one for one in self._acknowledged() if not one.seq or one.run_id not in run_ids]
        runs = (self._ask(self._find_lost_of, run_id) for run_id in run_ids)
        await asyncio.gather(self._read_all(others), *runs)

    async def _read_all(self, futures: Sequence[OperationFuture[Any]]) -> None:
        await asyncio.gather(*(self._ask(self._read_anew, future) for future in futures))

    async def _ask(self, ask: _Ask, subject: Any) -> None:
        """Asks once, and again and again beside whoever waits for this if the server cannot say:
        nothing is lost by that."""
        try:
            await ask(subject)
        except ClientClosedError:
            raise
        except TenSafeError:
            self.spawn(self._insist(ask, subject))

    async def _insist(self, ask: _Ask, subject: Any) -> None:
        backoff = Backoff()
        while True:
            await asyncio.sleep(backoff.next_s())
            try:
                await ask(subject)
                return
            except ClientClosedError:
                return
            except TenSafeError:
                continue
            except Exception as error:  # nobody else would end what waits for this
                self.fail_all(unexpected("asking what the server has", error))
                return

    async def _call_in_turn(self, method: Any, request: Any) -> Any:
        async with self._asking:
            return await self.call(method, request)

    async def _find_lost_of(self, run_id: str) -> None:
        futures = [one for one in self._acknowledged() if one.seq and one.run_id == run_id]
        # Noted before anything is asked: what is accepted meanwhile is there.
        accepted_seq = self._sequences[run_id].accepted_seq
        next_seq = await self._next_seq(run_id)
        if next_seq <= accepted_seq:
            self.lost(run_id, _lost(f"what run {run_id} had from seq {max(1, next_seq)} on"))
        await self._read_all([future for future in futures if future.seq >= next_seq])
        # Another client may have used the seqs of lost ones again. If the newest is there, so are
        # those that were accepted before it.
        there = [future for future in futures if future.seq < next_seq]
        for future in sorted(there, key=lambda future: future.seq, reverse=True):
            if await self._read_anew(future):
                return

    async def _next_seq(self, run_id: str) -> int:
        """What the server expects next of a run; 0 if it does not have the run."""
        stubs = await self.stubs()
        try:
            request = training_pb2.GetRunRequest(run_id=run_id)
            response = await self._call_in_turn(stubs.training.GetRun, request)
        except RunNotFoundError:
            return 0
        next_seq: int = response.run.next_seq
        return next_seq

    def _acknowledged(self) -> list[OperationFuture[Any]]:
        # Of the others, the submitter's answer will come.
        open_ones = [*self._by_place.values(), *self._by_id.values()]
        return [future for future in open_ones if future.operation_id is not None]

    async def _read_anew(self, future: OperationFuture[Any]) -> bool:
        """Takes over what became of an operation; False if it is lost."""
        stubs = await self.stubs()
        request = operations_pb2.GetOperationRequest(operation_id=future.operation_id or "")
        try:
            response = await self._call_in_turn(stubs.operations.GetOperation, request)
        except OperationNotFoundError:
            self._lose(future)
            return False
        if response.operation.HasField("finished_at"):
            self.finished(response.operation)
        return True

    def _lose(self, future: OperationFuture[Any]) -> None:
        self._by_id.pop(future.operation_id or "", None)
        place = f" (seq {future.seq} of {future.run_id})" if future.seq else ""
        error = _lost(f"operation {future.operation_id}{place}")
        if not future.done():
            self.refused(future, "", error)
        if future.seq:
            self.lost(future.run_id, error)

    def fail_all(self, error: TenSafeError) -> None:
        """Ends every open future, since nothing would resolve it any more."""
        self._submitter.fail_all(error)
        for future in [*self._by_place.values(), *self._by_id.values()]:
            future._fail(error)
            self._tell_id(future)
        self._by_place.clear()
        self._by_id.clear()

    # -- life

    def check_open(self) -> None:
        """Raises ClientClosedError if the session cannot be used here."""
        self.io.check_process()
        if self._closed:
            raise ClientClosedError("the client is closed", remedy="make a new ServiceClient")

    async def close(self) -> None:
        """Sends what still waits, then ends streams and channel; on the loop.

        Operations go on: futures that are still open end with ClientClosedError.
        """
        if self._closed:
            return
        try:
            async with asyncio.timeout(self.connection.timeout_s):
                while self._makers:
                    await asyncio.wait(self._makers)
                await self._submitter.flush()
        except TimeoutError:
            pass  # the futures of what was not sent say so below
        finally:
            self._closed = True
            self._watcher.stop()
            everything = (self._sender, *self._tasks, *self._makers)
            tasks = [task for task in everything if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # the sender puts back its batch
            self._stream.close()
            self.fail_all(
                ClientClosedError(
                    "the client was closed before the operation ended; if it was acknowledged, "
                    "it goes on",
                    remedy="client.future(operation_id) of a new client waits for it",
                )
            )
            await self._channel.close()
            self.io.forget(self.close)

    def _put(self, submission: Submission) -> None:
        if self._sender is None:
            self.io.at_exit(self.close)
            self.io.loop.call_soon_threadsafe(self._start_sender)
        self._submitter.put(submission)

    def _start_sender(self) -> None:
        if self._sender is None and not self._closed:
            self._sender = self.io.loop.create_task(
                self._submitter.run(self._watcher.ready), name="tensafe-submit"
            )

    def _finish(self, future: OperationFuture[Any], operation: operations_pb2.Operation) -> None:
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
        sequence = self._sequences.get(operation.run_id)
        if sequence is not None:
            sequence.step = step

    def _tell_id(self, future: OperationFuture[Any]) -> None:
        for told in self._awaiting_id.pop(future, ()):
            told.set()


def _gap(run_id: str, cause: TenSafeError) -> TenSafeError:
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


def _lost(what: str) -> OperationLostError:
    return OperationLostError(
        f"{what} was accepted, and the server does not have it any more: since it was started "
        "anew, what was last written to its disk is missing"
    )


def new_request_id() -> str:
    """Returns a fresh idempotency key."""
    return f"req-{secrets.token_hex(12)}"
