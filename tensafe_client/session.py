"""The core of a client: one channel, one session id, one submitter and one watch stream.

Everything marked "on the loop" runs on the process's I/O loop; the rest may be called from any
thread. The sync and the asyncio faces are both thin over this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
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
    OperationNotFoundError,
    RequestTimeoutError,
    TenSafeError,
    unexpected,
)
from tensafe_client.futures import OperationFuture
from tensafe_client.inquiry import Inquiry
from tensafe_client.io_loop import io_loop
from tensafe_client.open_operations import OpenOperations, gap_error
from tensafe_client.sequence import Place, RunSequence
from tensafe_client.submission import Submission, Submitter, check_size
from tensafe_client.submit_stream import SubmitStream
from tensafe_client.watching import Watcher

_WAIT_S = 60.0


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
        self.operations = OpenOperations(self._submitter.take_out, self._wait_beside)
        self._watcher = Watcher(self, Inquiry(self, self.operations))
        self._sender: asyncio.Task[None] | None = None
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
        self.operations.submitting()
        return await self._stream.send(stubs, request)

    def spawn(self, coroutine: Any) -> None:
        """Runs a background task that ends with the session; on the loop."""
        task = self.io.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- operations

    async def answered(self, run_id: str) -> None:
        """Returns once nothing is on its way to the server of what was numbered before a run lost
        seqs: it would be taken in among what is numbered after that; on the loop.

        Raises:
            ConnectionFailedError: if that takes too long.
        """
        if not self.operations.has_lost(run_id):
            return
        try:
            async with asyncio.timeout(self.connection.timeout_s):
                await self._submitter.answered()
        except TimeoutError:
            raise self._channel.unreachable("to take what was being sent") from None

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
            self.operations.add(future)
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
            raise gap_error(sequence.run_id, sequence.lost)
        seq = sequence.next_seq
        spec.seq = seq
        data = spec.SerializeToString()
        check_size(kind, len(data))
        sequence.next_seq = seq + 1
        future: OperationFuture[Any] = OperationFuture(self, kind, sequence.run_id, seq, offsets)
        self.operations.add(future)
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
                operation_id = await self.operations.identified(future)
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
            self.operations.ended(future, response.operation)
        return future.cancelled()

    async def is_running(self, operation_id: str) -> bool:
        """Whether a worker executes an operation now; on the loop."""
        stubs = await self.stubs()
        request = operations_pb2.GetOperationRequest(operation_id=operation_id)
        response = await self.call(stubs.operations.GetOperation, request)
        running: bool = response.operation.state == operations_pb2.OPERATION_STATE_RUNNING
        return running

    def _cancel_unmade(self, future: OperationFuture[Any]) -> bool:
        sequence = self.operations.sequences.get(future.run_id)
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

    async def wait_for(self, future: OperationFuture[Any], operation_id: str) -> None:
        """Resolves a future whose end this session's stream may not tell; on the loop."""
        try:
            await self._wait_for(future, operation_id)
        except OperationNotFoundError:  # it was there
            self.operations.lost(future)
        except TenSafeError as error:
            future._fail(error)
        except Exception as error:  # nobody else would end it
            future._fail(unexpected(f"waiting for {operation_id}", error))

    def _wait_beside(self, future: OperationFuture[Any], operation_id: str) -> None:
        self.spawn(self.wait_for(future, operation_id))

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

    def fail_all(self, error: TenSafeError) -> None:
        """Ends every open future, since nothing would resolve it any more; on the loop."""
        self._submitter.fail_all(error)
        self.operations.fail_all(error)

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


def new_request_id() -> str:
    """Returns a fresh idempotency key."""
    return f"req-{secrets.token_hex(12)}"
