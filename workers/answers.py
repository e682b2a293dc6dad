"""Outcomes that are kept for operations that are sent again: they were told, and may be lost."""

from __future__ import annotations

from collections import OrderedDict

from tensafe.v1 import worker_pb2

_Room = OrderedDict[str, tuple[str, worker_pb2.OperationDone]]


class Answers:
    """The last outcomes of all runs together, and of each private run its own.

    The coordinator asks for what a run's worker was sent as soon as the worker is back, before
    other runs go on. What a private run's worker was sent it asks for one by one, as each operation
    is prepared, and meanwhile other runs go on: their outcomes are not to take the place of those.

    Args:
        kept: how many outcomes; as many operations as a worker may have been sent, or more.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._common = _Room()
        self._apart: dict[str, _Room] = {}

    def keep_apart(self, run_id: str) -> None:
        """A private run is assigned."""
        self._apart[run_id] = _Room()

    def forget(self, run_id: str) -> None:
        """The run is not here any more, or under another assignment."""
        self._apart.pop(run_id, None)

    def put(self, done: worker_pb2.OperationDone, run_id: str) -> None:
        """Keeps an outcome of an operation of a run."""
        room = self._apart.get(run_id, self._common)
        room[done.operation_id] = (run_id, done)
        room.move_to_end(done.operation_id)  # it may be there from an earlier assignment
        if len(room) > self._kept:
            room.popitem(last=False)

    def get(self, operation_id: str, epoch: int) -> worker_pb2.OperationDone | None:
        """The outcome under an assignment; None if it is not kept."""
        for room in self._rooms():
            _, done = room.get(operation_id, ("", None))
            if done is not None and done.epoch == epoch:
                return done
        return None

    def all(self) -> list[tuple[str, worker_pb2.OperationDone]]:
        """Every outcome that is kept, with its run."""
        return [kept for room in self._rooms() for kept in list(room.values())]

    def _rooms(self) -> list[_Room]:
        return [self._common, *list(self._apart.values())]
