"""Properties of grouping: what comes together, what waits for company, and that it stays fair."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_server.fleet.groups import GroupBook
from tensafe_server.planning.planner import FairShares, Plan, plan
from tensafe_server.planning.views import (
    GroupView,
    Kind,
    QueueView,
    SampleRoom,
    Work,
    WorkerView,
)

LIMIT = 100.0
MODELS = ("small", "large")
KINDS = (None, *Kind)
TOGETHER = (Kind.GRADIENT, Kind.UPDATE)
WAIT_S = 0.004

works = st.builds(Work, st.floats(1, 1.5 * LIMIT), st.sampled_from(KINDS))
groups = st.builds(
    GroupView,
    number=st.just(0),
    kind=st.sampled_from(KINDS),
    model=st.sampled_from(MODELS),
    cost=st.floats(1, LIMIT),
)


@st.composite
def worker_views(draw: st.DrawFn, name: str) -> WorkerView:
    waiting = [
        GroupView(number, group.kind, group.model, group.cost)
        for number, group in enumerate(draw(st.lists(groups, max_size=4)), 5)
    ]
    idle = not waiting and draw(st.booleans())
    return WorkerView(
        name,
        frozenset(draw(st.sets(st.sampled_from(MODELS), min_size=1))),
        credits=draw(st.integers(0, 12)),
        runs=draw(st.integers(0, 3)),
        group_cost=draw(st.sampled_from([LIMIT, LIMIT, 0.0])),
        groups=waiting,
        plans=0 if idle else draw(st.integers(0, 3)),
        next_group=5 + len(waiting),
        idle=idle,
        company=draw(st.frozensets(st.sampled_from(MODELS))),
        samples=draw(st.none() | st.builds(SampleRoom, st.floats(-50, 300), st.integers(0, 4))),
    )


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[QueueView], list[WorkerView]]:
    workers = [draw(worker_views(f"w{number}")) for number in range(draw(st.integers(1, 3)))]
    next_groups = {worker.id: worker.next_group for worker in workers}
    queues = []
    for number in range(draw(st.integers(0, 7))):
        home = draw(st.sampled_from([None, *next_groups]))
        queues.append(
            QueueView(
                f"q{number}",
                draw(st.sampled_from(["a", "b", "c"])),
                draw(st.sampled_from(MODELS)),
                draw(st.lists(works, max_size=6)),
                home,
                last_group=draw(st.integers(0, next_groups[home] - 1)) if home else 0,
                since_s=draw(st.floats(0, 2 * WAIT_S)),
            )
        )
    return queues, workers


Member = tuple[str, Work]


def is_plan(work: Work, worker: WorkerView) -> bool:
    """Whether a worker has two of the kind at most."""
    beside = work.kind is Kind.SAMPLE and worker.samples is not None
    return not (beside or work.kind is Kind.UPDATE)


def members(decided: Plan, queues: list[QueueView]) -> dict[tuple[str, int], list[Member]]:
    """What each group got, by worker and number."""
    taken: Counter[str] = Counter()
    by_key = {queue.key: queue for queue in queues}
    found = defaultdict(list)
    for assignment in decided.assignments:
        work = by_key[assignment.key].works[taken[assignment.key]]
        taken[assignment.key] += 1
        found[assignment.worker_id, assignment.group].append((assignment.key, work))
    return found


@settings(deadline=None)
@given(fleets())
def test_groups_are_compatible_and_within_their_limit(fleet):
    queues, workers = fleet
    decided = plan(queues, workers, FairShares(), WAIT_S, WAIT_S)
    by_key = {queue.key: queue for queue in queues}
    by_id = {worker.id: worker for worker in workers}
    for (worker_id, number), group in members(decided, queues).items():
        worker = by_id[worker_id]
        if not worker.group_cost:
            assert number == 0
            continue
        there = [view for view in worker.groups if view.number == number]
        assert there or number >= worker.next_group
        kinds = {work.kind for _, work in group} | {view.kind for view in there}
        models = {by_key[key].model for key, _ in group} | {view.model for view in there}
        assert len(kinds) == len(models) == 1
        keys = [key for key, _ in group]
        assert len(set(keys)) == len(keys)
        if len(group) + len(there) > 1:
            assert kinds <= set(TOGETHER)
            cost = sum(work.cost for _, work in group) + sum(view.cost for view in there)
            assert cost <= worker.group_cost + 1e-9


@settings(deadline=None)
@given(fleets())
def test_a_runs_operations_go_to_ever_later_groups(fleet):
    queues, workers = fleet
    decided = plan(queues, workers, FairShares(), WAIT_S, WAIT_S)
    last = {queue.key: queue.last_group for queue in queues}
    grouping = {worker.id for worker in workers if worker.group_cost}
    for each in decided.assignments:
        if each.worker_id in grouping:
            assert each.group > last[each.key]
            last[each.key] = each.group


@settings(deadline=None)
@given(fleets())
def test_no_more_than_credits_and_two_plans_are_with_a_worker(fleet):
    queues, workers = fleet
    decided = plan(queues, workers, FairShares(), WAIT_S, WAIT_S)
    found = members(decided, queues)
    for worker in workers:
        own = {number: group for (id_, number), group in found.items() if id_ == worker.id}
        assert sum(map(len, own.values())) <= worker.credits
        opened = [
            number
            for number, group in own.items()
            if number >= worker.next_group and is_plan(group[0][1], worker)
        ]
        if worker.group_cost and opened:
            assert worker.plans + len(opened) <= 2
        room = worker.samples
        samples = [work for group in own.values() for _, work in group if work.kind is Kind.SAMPLE]
        if room is not None and samples:
            assert len(samples) <= room.credits
            assert sum(work.cost for work in samples[:-1]) < room.cost


@settings(deadline=None)
@given(fleets())
def test_what_could_go_goes_unless_it_waits_for_company(fleet):
    queues, workers = fleet
    decided = plan(queues, workers, FairShares())
    found = members(decided, queues)
    taken = Counter(each.key for each in decided.assignments)
    home = {each.key: each.worker_id for each in decided.assignments}
    last = {each.key: each.group for each in decided.assignments}
    for queue in queues:
        if taken[queue.key] == len(queue.works):
            continue
        work = queue.works[taken[queue.key]]
        bound = queue.worker_id or home.get(queue.key)
        for worker in workers:
            if worker.id != bound if bound else queue.model not in worker.models:
                continue
            own = {number: group for (id_, number), group in found.items() if id_ == worker.id}
            if sum(map(len, own.values())) == worker.credits:
                continue
            if work.kind is Kind.SAMPLE and worker.samples is not None:
                there = [w for group in own.values() for _, w in group if w.kind is Kind.SAMPLE]
                cost = sum(w.cost for w in there)
                assert len(there) >= worker.samples.credits or cost >= worker.samples.cost
                continue
            assert worker.group_cost
            assert work.kind is not Kind.UPDATE
            heavy = [n for n in own if n >= worker.next_group and is_plan(own[n][0][1], worker)]
            assert worker.plans + len(heavy) >= 2
            if work.kind not in TOGETHER:
                continue
            after = last.get(queue.key, queue.last_group)
            for number in {*own, *(view.number for view in worker.groups)}:
                there = [view for view in worker.groups if view.number == number]
                group = own.get(number, [])
                kind = there[0].kind if there else group[0][1].kind
                model = there[0].model if there else None
                models = {q.model for q in queues if q.key in {key for key, _ in group}}
                if (
                    number <= after
                    or kind is not work.kind
                    or {model, *models} - {None} != {queue.model}
                ):
                    continue
                cost = sum(w.cost for _, w in group) + sum(view.cost for view in there)
                assert cost + work.cost > worker.group_cost


@settings(deadline=None)
@given(fleets(), st.floats(0, 3 * WAIT_S))
def test_waiting_for_company_is_bounded_and_only_for_idle_workers(fleet, now_s: float):
    queues, workers = fleet
    at_once = plan(queues, workers, FairShares())
    decided = plan(queues, workers, FairShares(), now_s, WAIT_S)
    assert at_once.wake_at_s is None
    if decided.wake_at_s is None:
        assert decided.assignments == at_once.assignments
        return
    served = {each.worker_id for each in decided.assignments}
    waiting = [w for w in workers if w.idle and w.company and w.group_cost and w.id not in served]
    held = {each.key for each in at_once.assignments} - {each.key for each in decided.assignments}
    assert waiting
    assert held
    since = min(queue.since_s for queue in queues if queue.key in held)
    assert now_s < decided.wake_at_s <= since + WAIT_S + 1e-12
    # When the time is over, everything goes.
    late = max(queue.since_s for queue in queues) + WAIT_S
    assert plan(queues, workers, FairShares(), late, WAIT_S) == at_once


def gradient_queue(key: str, cost: float = 10.0, **options) -> QueueView:
    steps = [Work(cost, Kind.GRADIENT), Work(1.0, Kind.UPDATE)]
    return QueueView(key, key, "small", steps, "w", **options)


def grouping_worker(**options) -> WorkerView:
    fields = {"credits": 64, "runs": 8, "group_cost": LIMIT, "idle": True}
    return WorkerView("w", frozenset(["small"]), **fields | options)


def numbers(decided: Plan) -> list[tuple[str, int]]:
    return [(each.key, each.group) for each in decided.assignments]


def test_steps_of_several_runs_become_one_gradient_and_one_update():
    decided = plan([gradient_queue(key) for key in "abc"], [grouping_worker()], FairShares())
    assert sorted(numbers(decided)) == [(key, group) for key in "abc" for group in (1, 2)]


def test_large_gradients_are_left_alone_and_the_third_waits_outside():
    queues = [gradient_queue(key, 0.9 * LIMIT) for key in "abc"]
    decided = plan(queues, [grouping_worker()], FairShares())
    gradients = [each for each in numbers(decided) if each[1] in (1, 2)]
    assert gradients == [("a", 1), ("b", 2)]
    assert "c" not in {each.key for each in decided.assignments}


def test_what_comes_late_joins_the_group_that_waits():
    worker = grouping_worker(
        idle=False, plans=2, next_group=9, groups=[GroupView(8, Kind.GRADIENT, "small", 40.0)]
    )
    decided = plan([gradient_queue("a"), gradient_queue("b", 51.0)], [worker], FairShares())
    assert numbers(decided) == [("a", 8), ("a", 9)]


def test_only_a_small_gradient_waits_and_only_if_others_may_come():
    def wakes(queues, **options) -> float | None:
        return plan(queues, [grouping_worker(**options)], FairShares(), 1.0, WAIT_S).wake_at_s

    company = frozenset(["small"])
    small = [gradient_queue("a", since_s=1.0)]
    assert wakes(small, company=company) == 1.0 + WAIT_S
    assert wakes(small) is None
    assert wakes(small, company=frozenset(["large"])) is None
    assert wakes(small, company=company, idle=False, plans=1) is None
    assert wakes([gradient_queue("a", since_s=1.0 - WAIT_S)], company=company) is None
    assert wakes([gradient_queue("a", 0.6 * LIMIT, since_s=1.0)], company=company) is None
    other_work = QueueView("b", "b", "small", [Work(5.0)], "w")
    assert wakes([*small, other_work], company=company) is None
    update = QueueView("a", "a", "small", [Work(1.0, Kind.UPDATE)], "w", since_s=1.0)
    assert wakes([update], company=company) is None


def test_company_that_has_come_does_not_prolong_the_wait():
    worker = grouping_worker(company=frozenset(["small"]))
    queues = [
        gradient_queue("late", since_s=1.0 + WAIT_S / 2),
        gradient_queue("early", since_s=1.0),
    ]
    for order in (queues, queues[::-1]):
        decided = plan(order, [worker], FairShares(), 1.0 + WAIT_S / 2, WAIT_S)
        assert not decided.assignments
        assert decided.wake_at_s == pytest.approx(1.0 + WAIT_S)
        due = plan(order, [worker], FairShares(), 1.0 + WAIT_S, WAIT_S)
        assert {each.key for each in due.assignments} == {"late", "early"}


def test_samples_of_several_tenants_go_beside_two_plans_of_training():
    queues = [gradient_queue(key, 0.9 * LIMIT) for key in "abc"]
    queues += [QueueView(f"s{n}", f"t{n}", "small", [Work(60.0, Kind.SAMPLE)]) for n in range(6)]
    worker = grouping_worker(samples=SampleRoom(200.0, 32))
    sent = {each.key for each in plan(queues, [worker], FairShares()).assignments}
    assert sent == {"a", "b", "s0", "s1", "s2", "s3"}
    full = grouping_worker(samples=SampleRoom(0.0, 32))
    assert {each.key for each in plan(queues, [full], FairShares()).assignments} == {"a", "b"}
    one_by_one = grouping_worker()
    assert len(plan(queues[3:], [one_by_one], FairShares()).assignments) == 2


def test_a_sample_keeps_its_place_between_the_operations_of_its_run():
    work = [Work(10.0, Kind.GRADIENT), Work(60.0, Kind.SAMPLE), Work(10.0, Kind.GRADIENT)]
    queue = QueueView("a", "a", "small", work, "w")
    worker = grouping_worker(samples=SampleRoom(200.0, 32))
    assert numbers(plan([queue], [worker], FairShares())) == [("a", 1), ("a", 2), ("a", 3)]


def test_samples_without_a_run_go_where_most_room_is_and_count_as_no_run():
    lane = [
        QueueView(f"s{n}", "t", "small", [Work(60.0, Kind.SAMPLE)], is_lane=True) for n in range(3)
    ]
    run = QueueView("a", "t", "small", [Work(10.0, Kind.GRADIENT)])
    workers = [
        WorkerView("free", frozenset(["small"]), 9, 5, samples=SampleRoom(200.0, 9)),
        WorkerView("full", frozenset(["small"]), 9, 1, samples=SampleRoom(100.0, 9)),
    ]
    decided = plan([*lane, run], workers, FairShares())
    where = {each.key: each.worker_id for each in decided.assignments}
    assert where == {"s0": "free", "s1": "free", "s2": "full", "a": "full"}


@dataclass
class Simulation:
    """A coordinator and one worker that executes the first group whenever it is asked to."""

    queues: dict[str, QueueView]
    book: GroupBook = field(default_factory=GroupBook)
    shares: FairShares = field(default_factory=FairShares)
    taken: Counter[str] = field(default_factory=Counter)
    sent: dict[str, tuple[str, Work, int]] = field(default_factory=dict)
    executed: list[tuple[str, Work]] = field(default_factory=list)

    def plan(self) -> None:
        worker = WorkerView(
            "w",
            frozenset(["small"]),
            64 - len(self.sent),
            0,
            LIMIT,
            self.book.waiting(),
            self.book.plans,
            self.book.next,
            not self.sent,
        )
        last = {
            key: max((g for k, _, g in self.sent.values() if k == key), default=0)
            for key in self.queues
        }
        views = [
            QueueView(q.key, q.tenant_id, q.model, q.works[self.taken[q.key] :], "w", last[q.key])
            for q in self.queues.values()
        ]
        decided = plan(views, [worker], self.shares)
        self.shares = decided.shares
        for each in decided.assignments:
            number = self.taken[each.key]
            work = self.queues[each.key].works[number]
            self.taken[each.key] += 1
            operation_id = f"{each.key}/{number}"
            self.book.put(operation_id, each.group, work, "small")
            self.sent[operation_id] = each.key, work, each.group

    def execute(self) -> None:
        for operation_id in sorted(self.book.first()):
            key, work, _ = self.sent.pop(operation_id)
            assert operation_id == f"{key}/{sum(k == key for k, _ in self.executed)}"
            self.executed.append((key, work))
            self.book.ended(operation_id)


@st.composite
def loads(draw: st.DrawFn) -> list[QueueView]:
    """Two tenants that always have something to do, each in its own manner. Either could fill a
    group: a run has one operation in it at most, so few small runs cannot use up a share."""
    queues: list[QueueView] = []
    for tenant in ("a", "b"):
        cost = draw(st.floats(LIMIT / 10, 1.5 * LIMIT))
        kind = draw(st.sampled_from([None, Kind.GRADIENT]))
        step = [Work(cost, kind), Work(1.0, Kind.UPDATE)][: draw(st.integers(1, 2))]
        runs = draw(st.integers(math.ceil(LIMIT / cost), 12))
        queues += [
            QueueView(f"{tenant}{number}", tenant, "small", step * 40, "w")
            for number in range(runs)
        ]
    return queues


@settings(deadline=None)
@given(loads())
def test_tenants_share_by_cost_and_runs_keep_their_order(queues: list[QueueView]):
    simulation = Simulation({queue.key: queue for queue in queues})
    largest = {queue.tenant_id: queue.works[0].cost for queue in queues}
    for _ in range(40):
        simulation.plan()
        simulation.execute()  # asserts the order
        served = Counter[str]()
        for key, work in simulation.executed:
            served[key[0]] += work.cost
        for key, work, _ in simulation.sent.values():
            served[key[0]] += work.cost
        # Start-time fair queueing's bound, and what may join two groups while one waits.
        most = sum(largest.values()) + 2 * LIMIT + 2
        assert abs(served["a"] - served["b"]) <= most, (served, largest)


@settings(deadline=None)
@given(loads())
def test_everything_is_executed(queues: list[QueueView]):
    queues = [QueueView(q.key, q.tenant_id, q.model, q.works[:7], "w") for q in queues]
    simulation = Simulation({queue.key: queue for queue in queues})
    while simulation.plan() or simulation.sent:
        simulation.execute()
    assert len(simulation.executed) == sum(len(queue.works) for queue in queues)
