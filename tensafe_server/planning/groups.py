"""Groups of several runs' operations at one worker, while a plan is made.

A worker executes its groups in order; the operations of a group are of one kind, of one model and
of different runs. An operation joins the first group behind its run's last one that has room, or
opens a new one at the end. A worker has at most two plans: the one that it executes and the one
after it, a plan being one group of gradients (or one operation that goes alone) with the updates
around it. What comes meanwhile waits here, where it finds company.

Samples are no part of that. They lie beside the plans, as many as fill the worker twice: what it
generates and what takes the places that become free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensafe_server.planning.views import Arrivals, Kind, SampleRoom, Work, WorkerView

_MOST_PLANS = 2


@dataclass(slots=True)
class _Group:
    number: int
    kind: Kind | None
    model: str
    cost: float


@dataclass(slots=True)
class Spot:
    """A place for an operation at a worker: a group, or the worker's next one."""

    number: int
    group: _Group | None = None


_UNGROUPED = Spot(0)


@dataclass(slots=True)
class Opening:
    """The first group that this plan opens at a worker.

    Attributes:
        heads: keys of the queues whose next operation is in it.
        others: whether a queue's next operation went elsewhere: the worker has other work.
    """

    group: _Group
    heads: list[str] = field(default_factory=list)
    others: bool = False


class Formation:
    """One worker's groups and credits."""

    def __init__(self, worker: WorkerView) -> None:
        self.worker = worker
        self.credits = worker.credits
        self.runs = worker.runs
        self.arrivals = worker.arrivals
        self.opening: Opening | None = None
        self._plans = worker.plans
        self._samples = worker.samples
        self._next = worker.next_group
        self._groups = [_Group(g.number, g.kind, g.model, g.cost) for g in worker.groups]

    def admits(self, *, suspect: bool) -> bool:
        """Whether one more run may be brought to the worker."""
        return self.arrivals is Arrivals.NONE or not (suspect or self.arrivals is Arrivals.SUSPECT)

    def bring(self, *, suspect: bool) -> None:
        """One more run is brought to the worker."""
        self.runs += 1
        self.arrivals = Arrivals.SUSPECT if suspect else Arrivals.RUNS

    def spot(self, work: Work, model: str, after: int) -> Spot | None:
        """Where an operation of a run whose last one is in group `after` may go now."""
        if self.credits <= 0 or not self._has_room(work):
            return None
        if not self.worker.group_cost:
            return _UNGROUPED
        if self._goes_beside(work):
            return Spot(self._next)
        if work.kind in (Kind.GRADIENT, Kind.UPDATE):
            for group in self._groups:
                if (
                    group.number > after
                    and group.kind is work.kind
                    and group.model == model
                    and group.cost + work.cost <= self.worker.group_cost
                ):
                    return Spot(group.number, group)
        if work.kind is Kind.UPDATE or self._plans < _MOST_PLANS:
            return Spot(self._next)
        return None

    def take(self, spot: Spot, work: Work, model: str, key: str, *, head: bool) -> None:
        """Puts an operation there. `head`: it is its queue's next one."""
        self.credits -= 1
        beside = self._goes_beside(work)
        if beside and self._samples is not None:
            room = self._samples
            self._samples = SampleRoom(room.cost - work.cost, room.credits - 1)
        if spot.number == 0:
            return
        if spot.group is None:
            spot.group = _Group(spot.number, work.kind, model, work.cost)
            self._groups.append(spot.group)
            self._next += 1
            self._plans += not (beside or work.kind is Kind.UPDATE)
            if self.opening is None:
                self.opening = Opening(spot.group)
        else:
            spot.group.cost += work.cost
        if head and self.opening is not None:
            if spot.group is self.opening.group:
                self.opening.heads.append(key)
            else:
                self.opening.others = True

    @property
    def sample_room(self) -> float:
        """How much more of samples it takes; 0 if it executes them one by one."""
        return self._samples.cost if self._samples is not None else 0.0

    def _goes_beside(self, work: Work) -> bool:
        return work.kind is Kind.SAMPLE and self._samples is not None

    def _has_room(self, work: Work) -> bool:
        room = self._samples
        if room is None or work.kind is not Kind.SAMPLE:
            return True
        return room.cost > 0 and room.credits > 0

    @property
    def awaits_company(self) -> bool:
        """Whether all that the worker would begin now is one small group of gradients that other
        runs may soon join."""
        opening, worker = self.opening, self.worker
        return (
            worker.idle
            and opening is not None
            and not opening.others
            and opening.group.kind is Kind.GRADIENT
            and opening.group.model in worker.company
            and 2 * opening.group.cost <= worker.group_cost
        )
