"""What a worker has to do, in order.

The order is that of groups, not of arrival: what arrives for a group that has not begun is executed
with it. What arrives too late, or belongs to no group, is next.
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict
from dataclasses import dataclass

from tensafe.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Release:
    """The worker is to forget a run."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Flush:
    """Every run that has moved is to have a snapshot; `captured` is set when it is in memory."""

    captured: threading.Event


@dataclass(frozen=True, slots=True)
class Farewell:
    """The last thing to do before the worker leaves."""


_Command = Release | Flush | Farewell
Item = worker_pb2.RunAssignment | worker_pb2.PlannedOperation | _Command


class Agenda:
    """A queue of plans that are taken group by group.

    Groups are numbered anew by every stream; what an earlier stream sent comes first.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, list[Item]]] = []
        self._arrivals = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def put(self, stream: int, work: worker_pb2.Plan | _Command) -> None:
        """Adds work that came over the stream of that number."""
        parts: defaultdict[int, list[Item]] = defaultdict(list)
        if isinstance(work, worker_pb2.Plan):
            if work.runs:
                parts[0].extend(work.runs)
            for planned in work.operations:
                parts[planned.group].append(planned)
        else:
            parts[0].append(work)
        for group, items in parts.items():
            self._arrivals += 1
            heapq.heappush(self._heap, (stream, group, self._arrivals, items))

    def take(self) -> list[Item]:
        """What is next: all of a group that is there, or what one plan has without a group."""
        stream, group, _, items = heapq.heappop(self._heap)
        while group and self._heap and self._heap[0][:2] == (stream, group):
            items += heapq.heappop(self._heap)[3]
        return items
