"""The numbering of one run's operations, and what waits in its order for one that is being made."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensafe_client.errors import TenSafeError
from tensafe_client.futures import OperationFuture
from tensafe_client.submission import Submission


@dataclass(eq=False)
class Place:
    """A place in a run's order, taken by an operation whose content may not be known yet.

    Attributes:
        submission: what is sent there; None while it is being made, and what comes later waits.
    """

    future: OperationFuture[Any]
    submission: Submission | None = None


@dataclass
class RunSequence:
    """The numbering of one run's operations, shared by all its clients of one session.

    Every method is called under `lock`, so that operations are sent in the order of their seqs.

    Attributes:
        lost: why the server may never have seen some of its seqs. Until the run is attached to
            again nothing more is numbered: the server would only wait for the gap to be filled.
        accepted_seq: the last of which the server has said that it has it.
        held: the first place whose operation is being made, and all that came after it.
    """

    run_id: str
    next_seq: int
    step: int
    lost: TenSafeError | None = None
    accepted_seq: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: deque[Place] = field(default_factory=deque)

    def put(self, submission: Submission, send: Callable[[Submission], None]) -> None:
        """Sends an operation, or keeps it behind what is being made."""
        if self.held:
            self.held.append(Place(submission.future, submission))
        else:
            send(submission)

    def keep(self, future: OperationFuture[Any]) -> Place:
        """Keeps the next place for an operation that is being made."""
        place = Place(future)
        self.held.append(place)
        return place

    def is_open(self, place: Place) -> bool:
        """Whether it still waits for its operation."""
        return place.submission is None and place in self.held

    def fill(
        self, place: Place, submission: Submission, send: Callable[[Submission], None]
    ) -> None:
        """Gives an open place its operation, and sends what then waits for nothing more."""
        place.submission = submission
        while self.held and (ready := self.held[0].submission) is not None:
            self.held.popleft()
            send(ready)

    def open_place(self, future: OperationFuture[Any]) -> Place | None:
        """The place of a future whose operation is being made."""
        found = (place for place in self.held if place.future is future)
        return next((place for place in found if place.submission is None), None)

    def drop(self) -> list[OperationFuture[Any]]:
        """Forgets all that is held; returns its futures."""
        futures = [place.future for place in self.held]
        self.held.clear()
        return futures
