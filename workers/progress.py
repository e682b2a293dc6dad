"""Which operations wait, run and have ended: what the executor and the link know of one another.

Each side calls its own half, from its own thread. Between the two lie a deque and a dict, whose
single operations are atomic, so that neither side ever waits for a lock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from tensafe.v1 import training_pb2, worker_pb2
from workers.answers import Answers
from workers.operations import SampleChunk

_Key = tuple[str, int]


class Claim(Enum):
    """Whether an operation is to be executed now."""

    MINE = "it is, and runs from here on"
    RUNS = "it runs already; its answer comes when it has ended"
    ANSWERED = "it has been; its answer is sent again"
    CANCELLED = "it was cancelled"


@dataclass(slots=True)
class Known:
    """What was sent of a run under one assignment, and is not forgotten.

    Attributes:
        last_seq: of those that wait or run.
        operation_ids: of these, and of those whose answers are kept.
    """

    last_seq: int = 0
    operation_ids: set[str] = field(default_factory=set)


class Progress:
    """The state of every operation that is to be answered.

    Args:
        remembered: how many answers to keep for operations that are sent again; of each private run
            as many by themselves.
        instant: starts are not worth a report.
        on_news: called from either thread when `collect` would have news.
    """

    def __init__(self, remembered: int, instant: bool, on_news: Callable[[], None]) -> None:
        self._answers = Answers(remembered)
        self._instant = instant
        self._on_news = on_news
        # Claimed (popped) by the executor to run, or by a cancel: whoever pops it owns it.
        self._waiting: dict[_Key, worker_pb2.PlannedOperation] = {}
        self._done: deque[worker_pb2.OperationDone] = deque()
        self._running: dict[_Key, worker_pb2.PlannedOperation] = {}
        self._stoppable: set[_Key] = set()
        self._stops: deque[_Key] = deque()
        # The runs of those that run.
        self._runs: dict[_Key, str] = {}
        # Pieces of what streams, all from the first on: a new stream gets them again.
        self._pieces: dict[_Key, list[SampleChunk]] = {}
        # The link's own.
        self._told_starts: set[_Key] = set()
        self._told_pieces: dict[_Key, int] = {}

    # Called by the link.

    def expect(self, operations: Iterable[worker_pb2.PlannedOperation]) -> None:
        """Notes what was planned, before the executor gets it."""
        for planned in operations:
            if not (planned.replay or planned.void):
                self._waiting[_key(planned)] = planned

    def known(self) -> dict[tuple[str, int], Known]:
        """What of each run waits, runs, or has an answer, by run and epoch."""
        found: defaultdict[tuple[str, int], Known] = defaultdict(Known)
        # In the order in which an operation goes through them, so that none is missed.
        for planned in [*self._waiting.values(), *self._running.values()]:
            spec = training_pb2.OperationSpec.FromString(planned.spec)
            of_run = found[spec.run_id, planned.epoch]
            of_run.last_seq = max(of_run.last_seq, spec.seq)
            of_run.operation_ids.add(planned.operation_id)
        for run_id, done in self._answers.all():
            found[run_id, done.epoch].operation_ids.add(done.operation_id)
        return found

    def repeat(self, operations: Iterable[worker_pb2.PlannedOperation]) -> None:
        """Tells anew of what runs already, and what it has streamed: it was sent again over a new
        stream, which is to know of it, and has passed over what came before."""
        again = {key for planned in operations if (key := _key(planned)) in self._running}
        if again:
            self._told_starts -= again
            for key in again:
                self._told_pieces.pop(key, None)
            self._on_news()

    def new_stream(self) -> None:
        """What streams is told from its first piece on."""
        self._told_pieces.clear()

    def cancel(self, operation_id: str, *, waiting_only: bool = False) -> None:
        """Takes back an operation that has not started and, unless `waiting_only`, asks for the end
        of a running one that can be stopped; any other runs to its end."""
        for key in dict.fromkeys([*self._waiting, *self._running]):
            if key[0] == operation_id:
                self._cancel(key, waiting_only)

    def _cancel(self, key: _Key, waiting_only: bool) -> None:
        if key in self._running:  # and if it waits too, it was sent again over a new stream
            if key in self._stoppable and not waiting_only:
                self._stops.append(key)
            return
        if self._answers.get(*key) is not None:
            return  # sent again; its answer is
        planned = self._waiting.pop(key, None)
        if planned is None:
            if key in self._running:
                self._cancel(key, waiting_only)  # the executor was faster
            return
        # Remembered, as the answer may be lost with a coordinator that then sends it again: what
        # comes behind it may have been executed as behind a cancelled one.
        done = cancelled(planned)
        self._answers.put(done, training_pb2.OperationSpec.FromString(planned.spec).run_id)
        self.tell(done)

    def collect(self) -> tuple[list[worker_pb2.OperationStarted], list[worker_pb2.OperationDone]]:
        """Takes what happened since the last call: operations that began and still run, and
        operations that ended."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        if self._instant:
            return [], done
        ended = {outcome.operation_id for outcome in done}
        running = list(self._running)
        self._told_starts.intersection_update(running)
        begun = [key for key in running if key not in self._told_starts]
        self._told_starts.update(begun)
        started = [
            worker_pb2.OperationStarted(operation_id=operation_id, epoch=epoch)
            for operation_id, epoch in begun
            if operation_id not in ended
        ]
        return started, done

    def collect_chunks(self) -> list[tuple[int, SampleChunk]]:
        """Takes the streamed pieces since the last call, each with its operation's epoch."""
        chunks: list[tuple[int, SampleChunk]] = []
        for key in list(self._pieces):
            runs = key in self._running  # asked first: an ended one gets no more pieces
            told, pieces = self._told_pieces.get(key, 0), self._pieces[key]
            fresh = pieces[told:]
            chunks += [(key[1], piece) for piece in fresh]
            if runs:
                self._told_pieces[key] = told + len(fresh)
            else:
                del self._pieces[key]
                self._told_pieces.pop(key, None)
        return chunks

    # On the executor's thread.

    def keep_apart(self, run_id: str) -> None:
        """A private run is assigned: its answers are asked for later than others."""
        self._answers.keep_apart(run_id)

    def forget(self, run_id: str) -> None:
        """Nobody asks for a run's answers any more."""
        self._answers.forget(run_id)

    def claim(
        self, planned: worker_pb2.PlannedOperation, run_id: str = "", *, stoppable: bool = False
    ) -> Claim:
        """Whether the operation is to be executed.

        Args:
            run_id: of the run that it belongs to.
            stoppable: a cancel reaches it while it runs, by `stops`; none reaches any other.
        """
        key = _key(planned)
        if key in self._running:
            self._waiting.pop(key, None)
            return Claim.RUNS
        answered = self._answers.get(*key)
        if answered is not None:
            # Sent again after a broken stream: the answer may have been lost.
            sent_again = self._waiting.pop(key, None) is not None
            if sent_again or not answered.cancelled:
                self._done.append(answered)
            return Claim.CANCELLED if answered.cancelled else Claim.ANSWERED
        if stoppable:
            self._stoppable.add(key)
        self._runs[key] = run_id
        # Before it leaves the waiting ones, so that a cancel finds it in one of the two.
        self._running[key] = planned
        if self._waiting.pop(key, None) is None:
            self._drop(key)
            return Claim.CANCELLED
        return Claim.MINE

    def begin(self) -> None:
        """What was claimed is being executed from here on."""
        if not self._instant:
            self._on_news()

    def stream(self, planned: worker_pb2.PlannedOperation, chunk: SampleChunk) -> None:
        """Reports a piece of an operation that runs."""
        self._pieces.setdefault(_key(planned), []).append(chunk)
        self._on_news()

    def stops(self) -> list[worker_pb2.PlannedOperation]:
        """Running operations whose end was asked for since the last call, each once."""
        asked: dict[_Key, None] = {}
        while self._stops:
            asked[self._stops.popleft()] = None
        return [self._running[key] for key in asked if key in self._running]

    def end(self, outcomes: Iterable[worker_pb2.OperationDone]) -> None:
        """These have ended."""
        for done in outcomes:
            key = done.operation_id, done.epoch
            self._answers.put(done, self._runs.get(key, ""))
            self._done.append(done)
            self._drop(key)
        if not self._instant:
            self._on_news()

    def abandon(self, planned: worker_pb2.PlannedOperation) -> None:
        """An operation that runs ends without an outcome: it is left to its next assignment."""
        self._pieces.pop(_key(planned), None)
        self._drop(_key(planned))

    def _drop(self, key: _Key) -> None:
        self._running.pop(key, None)
        self._runs.pop(key, None)
        self._stoppable.discard(key)

    def tell(self, done: worker_pb2.OperationDone) -> None:
        """Reports an outcome that is not remembered."""
        self._done.append(done)
        self._on_news()


def cancelled(planned: worker_pb2.PlannedOperation) -> worker_pb2.OperationDone:
    """What is told of an operation that was cancelled."""
    return worker_pb2.OperationDone(
        operation_id=planned.operation_id, epoch=planned.epoch, cancelled=True
    )


def _key(planned: worker_pb2.PlannedOperation) -> _Key:
    # The epoch too: after a new assignment the same operation may come again behind the old one.
    return planned.operation_id, planned.epoch
