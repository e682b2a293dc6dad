"""Fair planning between tenants: (queues, workers, clock) -> assignments, and when to plan again.

Tenants share by cost (`fairness.py`), and so do the runs of a tenant among themselves: one with a
long queue does not hold up another. What belongs to no run's order is a tenant's one lane beside
its runs.

What is small finds company on the way (`groups.py`): a tenant whose turn comes later may add to a
group that another one has opened. One that meanwhile could not be served keeps its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tensafe_server.planning.fairness import Contest, FairShares
from tensafe_server.planning.groups import Formation, Spot
from tensafe_server.planning.views import Assignment, QueueView, WorkerView

_LANE = ""
"""Among a tenant's runs, the name of what belongs to none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where now.

    Attributes:
        assignments: in the order in which operations are given away; a worker executes them in
            the order of their groups.
        shares: the tenants' shares after them.
        wake_at_s: when to plan again even if nothing happens: an operation waits for company until
            then. None if none does.
    """

    assignments: Sequence[Assignment]
    shares: FairShares
    wake_at_s: float | None = None


def plan(
    queues: Iterable[QueueView],
    workers: Iterable[WorkerView],
    shares: FairShares,
    now_s: float = 0.0,
    company_wait_s: float = 0.0,
) -> Plan:
    """Decides which operations go where now.

    A queue's operations are assigned in order, to one worker, each to a later group than the one
    before; nothing is assigned beyond a worker's credits.

    Args:
        now_s: the clock of `QueueView.since_s`.
        company_wait_s: how long an operation may wait for company if the worker would else be
            idle; 0 turns it off.
    """
    queues, workers = list(queues), list(workers)
    assignments, after, fleet = _assign(queues, workers, shares)
    deadlines: dict[str, float] = {}
    if company_wait_s > 0:
        since = {queue.key: queue.since_s for queue in queues}
        for formation in fleet:
            if formation.opening is not None and formation.awaits_company:
                due = min(since[key] for key in formation.opening.heads) + company_wait_s
                if due > now_s:
                    deadlines[formation.worker.id] = due
    if not deadlines:
        return Plan(assignments, after)
    held = {each.key for each in assignments if each.worker_id in deadlines}
    held |= {queue.key for queue in queues if _would_go_back(queue, workers, deadlines.keys())}
    assignments, after, _ = _assign(
        [queue for queue in queues if queue.key not in held],
        [worker for worker in workers if worker.id not in deadlines],
        shares,
    )
    return Plan(assignments, after, min(deadlines.values()))


def _would_go_back(
    queue: QueueView, workers: Sequence[WorkerView], waiting: Collection[str]
) -> bool:
    """Whether a run would come to a worker that it avoids because all others wait for company."""
    if not queue.avoids or queue.worker_id is not None:
        return False
    others = [w.id for w in workers if queue.model in w.models and w.id not in queue.avoids]
    return bool(others) and all(worker_id in waiting for worker_id in others)


def _assign(
    queues: Sequence[QueueView], workers: Sequence[WorkerView], shares: FairShares
) -> tuple[list[Assignment], FairShares, Sequence[Formation]]:
    fleet = {worker.id: Formation(worker) for worker in workers}
    lines: dict[str, dict[str, deque[_Turn]]] = {}
    for queue in queues:
        if queue.works:
            name = _LANE if queue.is_lane else queue.key
            lines.setdefault(queue.tenant_id, {}).setdefault(name, deque()).append(_Turn(queue))
    # How far others may have gone ahead of one that could not be served.
    lag = 2 * max((worker.group_cost for worker in workers), default=0.0)
    tenants = Contest(lines, shares, lag)
    within = {
        tenant: Contest(own, shares.within.get(tenant, FairShares()), lag)
        for tenant, own in lines.items()
    }
    assignments: list[Assignment] = []
    while (tenant := tenants.next()) is not None:
        own = within[tenant]
        name, found = _next(own, lines[tenant], fleet)
        if own.has_passed_over:
            tenants.passed_over(tenant)
        if found is None:
            continue
        line, (formation, spot) = lines[tenant][name], found
        cost = line[0].cost
        assignments.append(line[0].take(formation, spot))
        if not line[0].go_on():
            line.popleft()
        own.served(name, cost, more=bool(line))
        tenants.served(tenant, cost, more=True)
    after = {tenant: own.shares() for tenant, own in within.items()}
    return assignments, tenants.shares(after), list(fleet.values())


def _next(
    contest: Contest, lines: Mapping[str, deque[_Turn]], fleet: Mapping[str, Formation]
) -> tuple[str, tuple[Formation, Spot] | None]:
    """The tenant's run (or lane) whose first operation goes next, and where; None: none can now.

    Operations that have no place are left out of this planning.
    """
    while (name := contest.next()) is not None:
        line = lines[name]
        while line:
            found = line[0].find(fleet)
            if found is not None:
                return name, found
            line.popleft()
        contest.passed_over(name)
    return "", None


class _Turn:
    """A queue on its way through one planning."""

    def __init__(self, queue: QueueView) -> None:
        self._queue = queue
        self._taken = 0
        self._worker_id = queue.worker_id
        self._last_group = queue.last_group

    @property
    def cost(self) -> float:
        """Of the operation that is next."""
        return self._queue.works[self._taken].cost

    def find(self, fleet: Mapping[str, Formation]) -> tuple[Formation, Spot] | None:
        """A place for the next operation. A run that is bound to no worker goes to the one with
        the fewest runs, then the most credits; what belongs to no run to the one that has the most
        room for it."""
        queue, work = self._queue, self._queue.works[self._taken]
        if self._worker_id is not None:
            formation = fleet.get(self._worker_id)
            if formation is None:
                return None
            spot = formation.spot(work, queue.model, self._last_group)
            return None if spot is None else (formation, spot)
        able = [
            (formation, spot)
            for formation in self._candidates(fleet)
            if (queue.is_lane or formation.admits(suspect=queue.suspect))
            and (spot := formation.spot(work, queue.model, 0)) is not None
        ]
        if not able:
            return None
        if queue.is_lane:
            return min(able, key=lambda each: _by_room(each[0]))
        return min(able, key=lambda each: _by_runs(each[0]))

    def _candidates(self, fleet: Mapping[str, Formation]) -> list[Formation]:
        """Workers of the model; those that the run avoids only if there are no others, be they busy
        or not."""
        queue = self._queue
        serving = [one for one in fleet.values() if queue.model in one.worker.models]
        return [one for one in serving if one.worker.id not in queue.avoids] or serving

    def take(self, formation: Formation, spot: Spot) -> Assignment:
        """Gives the next operation away."""
        queue, work = self._queue, self._queue.works[self._taken]
        if self._worker_id is None:
            self._worker_id = formation.worker.id
            if not queue.is_lane:
                formation.bring(suspect=queue.suspect)
        formation.take(spot, work, queue.model, queue.key, head=self._taken == 0)
        self._last_group = spot.number
        return Assignment(formation.worker.id, queue.key, spot.number)

    def go_on(self) -> bool:
        """Turns to the operation after it; False if there is none."""
        self._taken += 1
        return self._taken < len(self._queue.works)


def _by_runs(formation: Formation) -> tuple[float, float, str]:
    return formation.runs, -formation.credits, formation.worker.id


def _by_room(formation: Formation) -> tuple[float, float, str]:
    return -formation.sample_room, -formation.credits, formation.worker.id
