"""Fair planning between tenants.

Start-time fair queueing (Goyal, Vin and Cheng 1996) over tenants: each has a virtual time that
grows by the cost of what it was given; the tenant furthest behind goes next. A tenant that was idle
starts at the clock, so that it cannot save time up. Within a tenant its runs take turns.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiting operations of one run, or one operation without a place in a run.

    Attributes:
        key: the run's or the operation's id.
        costs: cost of each waiting operation, the next one first.
        worker_id: the worker that holds the run's state; None if any that runs the model will do.
    """

    key: str
    tenant_id: str
    model: str
    costs: Sequence[float]
    worker_id: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker: the models it runs, how many more operations it takes, how many runs it holds."""

    id: str
    models: frozenset[str]
    credits: int
    runs: int


@dataclass(frozen=True, slots=True)
class FairShares:
    """The tenants' virtual times, and the clock: that of the tenant served last."""

    times: Mapping[str, float] = field(default_factory=dict)
    clock: float = 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """The next operation of a queue goes to a worker."""

    worker_id: str
    key: str


def plan(
    queues: Iterable[QueueView], workers: Iterable[WorkerView], shares: FairShares
) -> tuple[list[Assignment], FairShares]:
    """Decides which operations go where now, in the order in which workers shall execute them.

    Returns:
        The assignments, and the shares after them. A queue's operations are assigned in order, to
        one worker; nothing is assigned beyond a worker's credits.
    """
    free = {worker.id: worker.credits for worker in workers}
    placement = _Placement(list(workers))
    waiting: dict[str, deque[_Turn]] = {}
    for queue in queues:
        if queue.costs:
            waiting.setdefault(queue.tenant_id, deque()).append(_Turn(queue))
    times = {tenant: max(shares.times.get(tenant, 0.0), shares.clock) for tenant in waiting}
    heap = [(time, tenant) for tenant, time in times.items()]
    heapq.heapify(heap)
    clock = shares.clock
    assignments: list[Assignment] = []
    while heap:
        time, tenant = heapq.heappop(heap)
        turns = waiting[tenant]
        while turns:
            turn = turns.popleft()
            worker = turn.worker_id or placement.choose(turn.queue.model, free)
            if worker is not None and free.get(worker, 0) > 0:
                break
        else:
            continue
        turn.worker_id = worker
        free[worker] -= 1
        assignments.append(Assignment(worker, turn.queue.key))
        clock = max(clock, time)
        times[tenant] = time + turn.queue.costs[turn.taken]
        turn.taken += 1
        if turn.taken < len(turn.queue.costs):
            turns.append(turn)
        if turns:
            heapq.heappush(heap, (times[tenant], tenant))
    ahead = {tenant: time for tenant, time in {**shares.times, **times}.items() if time > clock}
    return assignments, FairShares(ahead, clock)


class _Turn:
    """A queue on its way through one planning."""

    def __init__(self, queue: QueueView) -> None:
        self.queue = queue
        self.taken = 0
        self.worker_id = queue.worker_id


class _Placement:
    """Chooses workers for queues that are bound to none: fewest runs, then most credits."""

    def __init__(self, workers: list[WorkerView]) -> None:
        self._workers = workers
        self._placed = {worker.id: worker.runs for worker in workers}

    def choose(self, model: str, free: Mapping[str, int]) -> str | None:
        able = [w.id for w in self._workers if model in w.models and free[w.id] > 0]
        if not able:
            return None
        best = min(able, key=lambda worker: (self._placed[worker], -free[worker], worker))
        self._placed[best] += 1
        return best
