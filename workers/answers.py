"""Outcomes that are kept for operations that are sent again: they were told, and may be lost."""

from __future__ import annotations

from collections import OrderedDict

from tensafe.v1 import worker_pb2


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
        self._common: OrderedDict[str, worker_pb2.OperationDone] = OrderedDict()
        self._apart: dict[str, OrderedDict[str, worker_pb2.OperationDone]] = {}

    def keep_apart(self, run_id: str) -> None:
        """A private run is assigned."""
        self._apart[run_id] = OrderedDict()

    def forget(self, run_id: str) -> None:
        """The run is not here any more, or under another assignment."""
        self._apart.pop(run_id, None)

    def are_apart(self, run_id: str) -> bool:
        """Whether the run is private."""
        return run_id in self._apart

    def put(self, done: worker_pb2.OperationDone, run_id: str = "") -> None:
        """Keeps an outcome; `run_id`: of a run whose outcomes may be apart."""
        room = self._apart.get(run_id, self._common)
        room[done.operation_id] = done
        if len(room) > self._kept:
            room.popitem(last=False)

    def get(self, operation_id: str, epoch: int) -> worker_pb2.OperationDone | None:
        """The outcome under an assignment; None if it is not kept."""
        for room in (self._common, *list(self._apart.values())):
            done = room.get(operation_id)
            if done is not None and done.epoch == epoch:
                return done
        return None
