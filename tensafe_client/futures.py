"""The handle on a queued operation: a `concurrent.futures.Future` that is awaitable too."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from tensafe.v1 import operations_pb2 as pb
from tensafe.wire.tensors import Array
from tensafe_client.checks import check_seconds
from tensafe_client.errors import (
    DeadlineExceededError,
    OperationCancelledError,
    OperationTimeoutError,
    PreconditionError,
    from_status,
)
from tensafe_client.results import enum_name, result_of

if TYPE_CHECKING:
    from tensafe_client.session import Session

T = TypeVar("T")

_FINISHED = frozenset(
    {pb.OPERATION_STATE_SUCCEEDED, pb.OPERATION_STATE_FAILED, pb.OPERATION_STATE_CANCELLED}
)


class OperationFuture(concurrent.futures.Future[T], Generic[T]):
    """An operation that was submitted, and its result once it has one.

        future = tc.forward_backward(batch)
        result = future.result(timeout=60)     # or: result = await future

    It works with `concurrent.futures.wait` and `as_completed`. A wait that times out, and an
    `await` that is cancelled, leave the operation running; only `cancel()` cancels it. (So await
    it as it is: `asyncio.wrap_future` calls `cancel()` when what waits for it is cancelled.)
    Callbacks run on the SDK's I/O thread: they may submit operations, but must not block.

    Attributes:
        kind: "forward", "forward_backward", "optim_step", "private_step", "sample", "save_state",
            "load_state".
        run_id: its run; empty for a sample from an artifact or a base model.
        seq: its place in the run's order; 0 if it has none.
    """

    def __init__(
        self, session: Session, kind: str, run_id: str, seq: int, offsets: Array | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.run_id = run_id
        self.seq = seq
        self._session = session
        self._offsets = offsets
        self._operation_id: str | None = None
        self._converted: Any = None
        # What a result is shown as, where this side knows more of it than the server.
        self._shown: Callable[[Any], Any] | None = None

    @property
    def operation_id(self) -> str | None:
        """The server's id, `op-…`; None until the server has answered the submission."""
        return self._operation_id

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result.

        Args:
            timeout: longest wait, seconds. None: no limit.

        Raises:
            OperationTimeoutError: if the wait ends first; the operation goes on.
            OperationCancelledError: if it was cancelled.
            ConfigError: for a timeout that is no number of seconds, 0 or more.
            DeadlineExceededError: if its `deadline_s` was over before it ran.
            TenSafeError: what the operation failed with.
        """
        if self._converted is None:
            self._wait(timeout)
            # Unpacked by whoever asks, so that the I/O thread only hands over.
            operation = super().result(0)
            converted = result_of(cast(pb.Operation, operation), self._offsets)
            self._converted = self._shown(converted) if self._shown is not None else converted
        return cast(T, self._converted)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the end and returns what the operation failed with; None if it succeeded.

        Raises:
            OperationTimeoutError: if the wait ends first; the operation goes on.
            OperationCancelledError: if it was cancelled.
        """
        self._wait(timeout)
        return super().exception(0)

    def check(self) -> None:
        """Raises what an operation that has ended failed with; nothing if it succeeded."""
        error = self.exception(0)
        if error is not None:
            raise error

    def cancel(self) -> bool:
        """Cancels the operation on the server, if it has not started, and a sample also while it
        runs; blocks for the answer.

        Returns:
            True only if the operation never ran, or is a sample that was stopped and gives nothing.
            A False one goes on or has ended.
        """
        if self.done():
            return self.cancelled()
        return self._session.io.run(self._session.cancel_operation(self))

    def running(self) -> bool:
        """Asks the server whether a worker executes the operation now; blocks for the answer."""
        if self.done() or self._operation_id is None:
            return False
        return self._session.io.run(self._session.is_running(self._operation_id))

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait_async().__await__()

    def __repr__(self) -> str:
        parts = [self.kind, self.run_id, f"seq={self.seq}" if self.seq else ""]
        parts += [self._operation_id or "op-?", self._state_name()]
        return f"<OperationFuture {' '.join(part for part in parts if part)}>"

    def _state_name(self) -> str:
        if not self.done():
            return "sending" if self._operation_id is None else "accepted"
        if self.cancelled():
            return "cancelled"
        error = super().exception(0)
        if error is None:
            return "succeeded"
        return f"failed: {getattr(error, 'reason', '') or type(error).__name__}"

    def _wait(self, timeout: float | None) -> None:
        """Waits until done, and turns the base class's exceptions into typed ones."""
        if timeout is not None:
            # The standard library's waits overflow beyond this, 292 years.
            timeout = min(check_seconds("timeout", timeout), threading.TIMEOUT_MAX)
        if not self.done() and self._session.io.is_current_thread():
            raise RuntimeError(
                f"{self!r} is not done, and a done-callback must not wait for it: the thread "
                "that would resolve it is this one"
            )
        try:
            super().exception(timeout)
        except concurrent.futures.CancelledError:
            raise self._cancelled_error() from None
        except TimeoutError:
            raise self._timeout_error(timeout) from None

    async def _wait_async(self) -> T:
        if not self.done():
            loop = asyncio.get_running_loop()
            # A future of the caller's loop, and not asyncio.wrap_future: cancelling the wait must
            # not cancel the operation, nor a cancelled operation the waiting task.
            ended = loop.create_future()

            def wake(_: object) -> None:
                if not ended.done():
                    ended.set_result(None)

            def on_done(_: object) -> None:
                try:
                    loop.call_soon_threadsafe(wake, None)
                except RuntimeError:  # the waiter's loop is closed: nobody waits any more
                    return

            self.add_done_callback(on_done)
            await ended
        return self.result(0)

    def _cancelled_error(self) -> OperationCancelledError:
        how = "" if self.kind == "sample" else " before it ran"
        return OperationCancelledError(
            f"{self._name()} was cancelled{how}",
            reason="OPERATION_CANCELLED",
            code="CANCELLED",
            metadata=self._metadata(),
        )

    def _expired_error(self) -> PreconditionError:
        return PreconditionError(
            f"{self._name()} succeeded, but its per-token outputs or completions are past the "
            "server's retention",
            reason="RESULT_EXPIRED",
            code="FAILED_PRECONDITION",
            metadata=self._metadata(),
            remedy="read results while they are fresh; metrics of steps stay in metrics()",
        )

    def _timeout_error(self, timeout: float | None) -> OperationTimeoutError:
        again = (
            f"client.future({self._operation_id!r}).result() in any process"
            if self._operation_id
            else "result() of this future"
        )
        return OperationTimeoutError(
            f"{self._name()} did not end within {timeout:g} s; it goes on",
            metadata=self._metadata(),
            remedy=f"wait again with {again}, or cancel it with cancel()",
        )

    def _name(self) -> str:
        place = f" (run {self.run_id}, seq {self.seq})" if self.run_id else ""
        return f"{self.kind} {self._operation_id or 'not yet acknowledged'}{place}"

    def _metadata(self) -> dict[str, str]:
        pairs = {"operation_id": self._operation_id or "", "run_id": self.run_id}
        return {key: value for key, value in pairs.items() if value}

    # What follows is called on the I/O thread only, so that an operation ends once.

    def _identify(self, operation_id: str) -> None:
        if self._operation_id is None and operation_id:
            self._operation_id = operation_id

    def _finish(self, operation: pb.Operation) -> bool:
        """Takes over the server's view of the operation; True if it has ended."""
        self._identify(operation.id)
        if self.done():
            return True
        state = operation.state
        if state not in _FINISHED:
            return False
        if state == pb.OPERATION_STATE_SUCCEEDED and operation.result_pruned:
            self.set_exception(self._expired_error())
        elif state == pb.OPERATION_STATE_SUCCEEDED:
            # The base class keeps the message; `result` unpacks it.
            self.set_result(cast(T, operation))
        elif state == pb.OPERATION_STATE_CANCELLED:
            error = from_status(operation.error)
            if isinstance(error, DeadlineExceededError):
                self.set_exception(error)
                return True
            self._cancel_here()
        else:
            self.set_exception(from_status(operation.error))
        return True

    def _fail(self, error: BaseException) -> None:
        if not self.done():
            self.set_exception(error)

    def _cancel_here(self) -> None:
        """Ends an operation that will never run."""
        if not self.done():
            super().cancel()
            self.set_running_or_notify_cancel()

    @classmethod
    def _rebuild(cls, session: Session, operation: pb.Operation) -> OperationFuture[Any]:
        """Makes a handle on an operation that another client has submitted."""
        kind = enum_name(pb.OperationKind, operation.kind)
        future: OperationFuture[Any] = OperationFuture(
            session, kind, operation.run_id, operation.seq
        )
        future._finish(operation)
        return future
