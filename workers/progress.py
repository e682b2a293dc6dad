"""Which operations wait, run and have ended: what the executor and the link know of one another.

Each side calls its own half, from its own thread. Between the two lie a deque and a dict, whose
single operations are atomic, so that neither side ever waits for a lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from tensafe.v1 import worker_pb2
from workers.operations import SampleChunk

_Key = tuple[str, int]


class Claim(Enum):
    """Whether an operation is to be executed now."""

    MINE = "it is"
    ANSWERED = "it has been; its answer is sent again"
    CANCELLED = "it was cancelled"


class Progress:
    """The state of every operation that is to be answered.

    Args:
        remembered: how many answers to keep for operations that are sent again.
        instant: starts are not worth a report.
        on_news: called from either thread when `collect` would have news.
    """

    def __init__(self, remembered: int, instant: bool, on_news: Callable[[], None]) -> None:
        self._remembered = remembered
        self._instant = instant
        self._on_news = on_news
        # Claimed (popped) by the executor to run, or by a cancel: whoever pops it owns it.
        self._waiting: dict[_Key, worker_pb2.PlannedOperation] = {}
        self._cancelled: set[_Key] = set()
        self._done: deque[worker_pb2.OperationDone] = deque()
        self._chunks: deque[tuple[int, SampleChunk]] = deque()
        self._running: Sequence[worker_pb2.PlannedOperation] = ()
        self._reported: Sequence[worker_pb2.PlannedOperation] = ()
        self._recent: OrderedDict[str, worker_pb2.OperationDone] = OrderedDict()

    # Called by the link.

    def expect(self, operations: Iterable[worker_pb2.PlannedOperation]) -> None:
        """Notes what was planned, before the executor gets it."""
        for planned in operations:
            if not (planned.replay or planned.void):
                self._waiting[_key(planned)] = planned

    def repeat(self, operations: Iterable[worker_pb2.PlannedOperation]) -> None:
        """Tells anew of what runs already: it was sent again over a new stream, which is to know
        of it."""
        if any(self._runs_already(_key(planned)) for planned in operations):
            self._reported = ()
            self._on_news()

    def cancel(self, operation_id: str) -> None:
        """Takes back an operation that has not started; one that has runs to its end."""
        for key in list(self._waiting):
            if key[0] == operation_id:
                self._cancel(key)

    def _cancel(self, key: _Key) -> None:
        answered = self._recent.get(key[0])
        if self._runs_already(key) or (answered is not None and answered.epoch == key[1]):
            return  # it was sent again over a new stream, and has begun already
        planned = self._waiting.pop(key, None)
        if planned is None:
            return
        self._cancelled.add(key)
        self.tell(
            worker_pb2.OperationDone(
                operation_id=planned.operation_id, epoch=planned.epoch, cancelled=True
            )
        )

    def _runs_already(self, key: _Key) -> bool:
        return any(_key(planned) == key for planned in self._running)

    def collect(self) -> tuple[list[worker_pb2.OperationStarted], list[worker_pb2.OperationDone]]:
        """Takes what happened since the last call: operations that began and still run, and
        operations that ended."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        running = self._running
        if not running or running is self._reported or self._instant:
            return [], done
        self._reported = running
        ended = {outcome.operation_id for outcome in done}
        started = [
            worker_pb2.OperationStarted(operation_id=planned.operation_id, epoch=planned.epoch)
            for planned in running
            if planned.operation_id not in ended
        ]
        return started, done

    def collect_chunks(self) -> list[tuple[int, SampleChunk]]:
        """Takes the streamed pieces since the last call, each with its operation's epoch."""
        chunks = []
        while self._chunks:
            chunks.append(self._chunks.popleft())
        return chunks

    # On the executor's thread.

    def claim(self, planned: worker_pb2.PlannedOperation) -> Claim:
        """Whether the operation is to be executed; if so, no cancel reaches it any more."""
        key = _key(planned)
        claimed = self._waiting.pop(key, None)
        answered = self._recent.get(planned.operation_id)
        if answered is not None and answered.epoch == planned.epoch:
            # Sent again after a broken stream: the answer may have been lost.
            self._done.append(answered)
            return Claim.ANSWERED
        if claimed is None:
            self._cancelled.discard(key)
            return Claim.CANCELLED
        return Claim.MINE

    def begin(self, operations: Sequence[worker_pb2.PlannedOperation]) -> None:
        """These are being executed from here on; a new sequence each time."""
        self._running = operations
        if not self._instant:
            self._on_news()

    def end(self, outcomes: Iterable[worker_pb2.OperationDone]) -> None:
        """What was begun has ended. An operation without an outcome is left to its next
        assignment."""
        for done in outcomes:
            self._recent[done.operation_id] = done
            if len(self._recent) > self._remembered:
                self._recent.popitem(last=False)
            self._done.append(done)
        self._running = ()
        if not self._instant:
            self._on_news()

    def tell(self, done: worker_pb2.OperationDone) -> None:
        """Reports an outcome that is not remembered."""
        self._done.append(done)
        self._on_news()

    def stream(self, epoch: int, chunk: SampleChunk) -> None:
        """Reports a piece of an operation that runs."""
        self._chunks.append((epoch, chunk))
        self._on_news()


def _key(planned: worker_pb2.PlannedOperation) -> _Key:
    # The epoch too: after a new assignment the same operation may come again behind the old one.
    return planned.operation_id, planned.epoch
