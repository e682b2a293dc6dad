"""What the planner sees of queues and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """Kinds of operations that a worker may execute together for different runs.

    An update costs next to nothing beside a gradient: as many as there are may wait at a worker. A
    sample only begins in its turn and goes on beside the others.
    """

    GRADIENT = "forward_backward"
    UPDATE = "optim_step"
    SAMPLE = "sample"


class Arrivals(Enum):
    """What is on its way to a worker."""

    NONE = "no run"
    RUNS = "runs"
    SUSPECT = "a run that comes alone"


class Work(NamedTuple):
    """A waiting operation.

    Attributes:
        cost: in forwarded tokens.
        kind: None if it must be executed alone.
    """

    cost: float
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiting operations of one run, or one operation without a place in a run.

    Attributes:
        key: the run's or the operation's id.
        works: the waiting operations, the next one first.
        worker_id: the worker that holds the run's state; None if any that runs the model will do.
        last_group: the group at that worker that holds the run's operation before these; 0 if it
            has none there.
        since_s: when the next operation came, on the planner's clock.
        suspect: workers were lost while the run's state was brought to them. It comes to the next
            one alone, so that it is known with what that one is lost.
        is_lane: it is one operation without a place in a run, which leaves nothing at its worker.
        avoids: workers that did not bring the run to where it stands; others come before them.
    """

    key: str
    tenant_id: str
    model: str
    works: Sequence[Work]
    worker_id: str | None = None
    last_group: int = 0
    since_s: float = 0.0
    suspect: bool = False
    is_lane: bool = False
    avoids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group that waits at a worker: what comes in time is executed with it.

    Attributes:
        number: its place in the worker's order.
        cost: of its operations together.
    """

    number: int
    kind: Kind | None
    model: str
    cost: float


@dataclass(frozen=True, slots=True)
class SampleRoom:
    """What a worker that generates several samples at once takes of them.

    Attributes:
        cost: it takes one more as long as this is above 0.
        credits: how many more samples it takes.
    """

    cost: float
    credits: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker.

    Attributes:
        models: the models that it runs.
        credits: how many more operations it takes.
        runs: how many runs it holds.
        group_cost: most cost of one group; 0 if it executes operations one by one, as they come.
        groups: the groups that it has not begun yet, in their order.
        plans: how many groups it has, begun or not, that are more than updates and samples.
        next_group: the number of its next group.
        idle: it has nothing to do.
        company: models of which it holds runs that were active a moment ago, have nothing queued,
            and may be grouped with others.
        arrivals: what is on its way to it.
        samples: what it takes of samples; None if it executes them one by one, like everything.
    """

    id: str
    models: frozenset[str]
    credits: int
    runs: int
    group_cost: float = 0.0
    groups: Sequence[GroupView] = ()
    plans: int = 0
    next_group: int = 1
    idle: bool = False
    company: frozenset[str] = frozenset()
    arrivals: Arrivals = Arrivals.NONE
    samples: SampleRoom | None = None


class Assignment(NamedTuple):
    """The next operation of a queue goes to a worker, into a group of it (0: none)."""

    worker_id: str
    key: str
    group: int = 0
