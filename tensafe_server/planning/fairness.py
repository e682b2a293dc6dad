"""Start-time fair queueing (Goyal, Vin and Cheng 1996): who goes next, by what each was given.

Each name has a virtual time that grows by the cost of what it was given; the one furthest behind
goes next. One that was idle starts at the clock, so that it cannot save time up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FairShares:
    """What is remembered between two plannings.

    Attributes:
        times: virtual times of those that are ahead of the clock, or were passed over.
        clock: the time of the one that was served last.
        within: the shares among what each name consists of.
    """

    times: Mapping[str, float] = field(default_factory=dict)
    clock: float = 0.0
    within: Mapping[str, FairShares] = field(default_factory=dict)


class Contest:
    """One planning among names that have something waiting.

    Args:
        lag: how far others may have gone ahead of one that could not be served.
    """

    def __init__(self, names: Iterable[str], shares: FairShares, lag: float) -> None:
        self._before = shares
        self._clock = shares.clock
        self._times = {
            name: max(shares.times.get(name, shares.clock), shares.clock - lag) for name in names
        }
        self._heap = [(time, name) for name, time in self._times.items()]
        heapq.heapify(self._heap)
        self._unserved: set[str] = set()

    def next(self) -> str | None:
        """The one whose turn it is; it comes back only if it is served and has more."""
        return heapq.heappop(self._heap)[1] if self._heap else None

    @property
    def has_passed_over(self) -> bool:
        """Whether something could not be served now."""
        return bool(self._unserved)

    def passed_over(self, name: str) -> None:
        """Something of it could not be served now: it keeps its place."""
        self._unserved.add(name)

    def served(self, name: str, cost: float, *, more: bool) -> None:
        """It was given work of this cost, and has `more` that waits."""
        self._clock = max(self._clock, self._times[name])
        self._times[name] += cost
        if more:
            heapq.heappush(self._heap, (self._times[name], name))

    def shares(self, within: Mapping[str, FairShares] | None = None) -> FairShares:
        """What is to be remembered."""
        times = {
            name: time
            for name, time in {**self._before.times, **self._times}.items()
            if time > self._clock or name in self._unserved
        }
        inner = {**self._before.within, **(within or {})}
        return FairShares(
            times, self._clock, {name: own for name, own in inner.items() if own.times}
        )
