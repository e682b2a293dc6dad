"""Properties of the planner: a pure function, so no server is needed."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_server.planning.fairness import FairShares
from tensafe_server.planning.planner import plan
from tensafe_server.planning.views import Arrivals, Kind, QueueView, Work, WorkerView

MODELS = ("small", "large")


def works(*costs: float) -> list[Work]:
    return [Work(cost) for cost in costs]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[QueueView], list[WorkerView]]:
    workers = [
        WorkerView(
            f"w{number}",
            frozenset(draw(st.sets(st.sampled_from(MODELS), min_size=1))),
            draw(st.integers(0, 6)),
            draw(st.integers(0, 3)),
        )
        for number in range(draw(st.integers(0, 3)))
    ]
    homes = st.sampled_from([None, *[worker.id for worker in workers], "gone"])
    queues = [
        QueueView(
            f"q{number}",
            draw(st.sampled_from(["a", "b", "c"])),
            draw(st.sampled_from(MODELS)),
            works(*draw(st.lists(st.floats(1, 100), max_size=8))),
            draw(homes),
        )
        for number in range(draw(st.integers(0, 6)))
    ]
    return queues, workers


@settings(deadline=None)
@given(fleets())
def test_plans_keep_to_credits_models_and_homes(fleet: tuple[list[QueueView], list[WorkerView]]):
    queues, workers = fleet
    assignments = plan(queues, workers, FairShares()).assignments
    by_key = {queue.key: queue for queue in queues}
    by_id = {worker.id: worker for worker in workers}
    given_to = Counter(assignment.worker_id for assignment in assignments)
    taken = Counter(assignment.key for assignment in assignments)
    homes: dict[str, str] = {}
    for worker, count in given_to.items():
        assert count <= by_id[worker].credits
    for key, count in taken.items():
        assert count <= len(by_key[key].works)
    for assignment in assignments:
        queue = by_key[assignment.key]
        assert homes.setdefault(assignment.key, assignment.worker_id) == assignment.worker_id
        if queue.worker_id is None:
            assert queue.model in by_id[assignment.worker_id].models
        else:
            assert assignment.worker_id == queue.worker_id


@settings(deadline=None)
@given(fleets(), st.floats(0, 100))
def test_the_same_again_is_planned_the_same_and_what_was_given_stays_as_it_was(
    fleet: tuple[list[QueueView], list[WorkerView]], now_s: float
):
    queues, workers = fleet
    shares = plan(queues, workers, FairShares()).shares
    given_in = deepcopy((queues, workers, shares))
    first = plan(queues, workers, shares, now_s, 0.004)
    assert (queues, workers, shares) == given_in
    again = plan(*deepcopy(given_in), now_s, 0.004)
    assert again == first


@settings(deadline=None)
@given(fleets())
def test_no_credit_stays_unused_while_work_could_use_it(
    fleet: tuple[list[QueueView], list[WorkerView]],
):
    queues, workers = fleet
    assignments = plan(queues, workers, FairShares()).assignments
    taken = Counter(assignment.key for assignment in assignments)
    used = Counter(assignment.worker_id for assignment in assignments)
    home = {assignment.key: assignment.worker_id for assignment in assignments}
    for queue in queues:
        if taken[queue.key] == len(queue.works):
            continue
        bound = queue.worker_id or home.get(queue.key)
        able = [w for w in workers if (w.id == bound if bound else queue.model in w.models)]
        assert all(used[w.id] == w.credits for w in able)


@settings(deadline=None)
@given(st.floats(1, 50), st.floats(1, 50), st.integers(20, 60))
def test_tenants_get_equal_cost_not_equal_counts(cost_a: float, cost_b: float, rounds: int):
    queues = [
        QueueView("a", "a", "small", works(*[cost_a] * 500)),
        QueueView("b", "b", "small", works(*[cost_b] * 500)),
    ]
    shares = FairShares()
    served = Counter[str]()
    for _ in range(rounds):
        decided = plan(queues, [WorkerView("w", frozenset(["small"]), 2, 0)], shares)
        shares = decided.shares
        for assignment in decided.assignments:
            served[assignment.key] += cost_a if assignment.key == "a" else cost_b
    assert abs(served["a"] - served["b"]) <= 2 * max(cost_a, cost_b) + 1e-6


def test_an_idle_tenant_saves_nothing_up():
    worker = WorkerView("w", frozenset(["small"]), 4, 0)
    shares = FairShares()
    for _ in range(100):
        alone = [QueueView("a", "a", "small", works(*[10.0] * 4))]
        shares = plan(alone, [worker], shares).shares
    both = [QueueView(key, key, "small", works(*[10.0] * 9)) for key in ("a", "b")]
    assignments = plan(both, [worker], shares).assignments
    assert Counter(assignment.key for assignment in assignments)["a"] >= 1


def test_a_tenants_runs_take_turns():
    queues = [QueueView(key, "a", "small", works(*[1.0] * 5)) for key in ("x", "y")]
    worker = WorkerView("w", frozenset(["small"]), 4, 0)
    assignments = plan(queues, [worker], FairShares()).assignments
    assert [assignment.key for assignment in assignments] == ["x", "y", "x", "y"]


@settings(deadline=None)
@given(st.floats(1, 50), st.floats(1, 50), st.integers(1, 3), st.integers(10, 40))
def test_a_tenants_runs_share_by_cost_over_many_plannings(
    cost_x: float, cost_y: float, free: int, rounds: int
):
    """A run with a long queue, whatever its id, does not hold up another."""
    costs = {"x": cost_x, "y": cost_y}
    queues = [QueueView(key, "a", "small", works(*[costs[key]] * 500)) for key in costs]
    worker = WorkerView("w", frozenset(["small"]), free, 0)
    served, shares = Counter[str](), FairShares()
    for _ in range(rounds):
        decided = plan(queues, [worker], shares)
        shares = decided.shares
        for assignment in decided.assignments:
            served[assignment.key] += costs[assignment.key]
    assert abs(served["x"] - served["y"]) <= 2 * max(costs.values()) + 1e-6


def test_what_belongs_to_no_run_waits_for_its_turn_and_not_for_the_runs():
    runs = [QueueView(key, "a", "small", works(*[1.0] * 500)) for key in ("r1", "r2")]
    lane = [QueueView(f"op-{n}", "a", "small", works(1.0), is_lane=True) for n in range(9)]
    worker = WorkerView("w", frozenset(["small"]), 1, 0)
    order, shares = [], FairShares()
    for _ in range(12):
        decided = plan([*runs, *lane], [worker], shares)
        (assignment,), shares = decided.assignments, decided.shares
        order.append(assignment.key)
        lane = [queue for queue in lane if queue.key != assignment.key]
    assert sum(key.startswith("op-") for key in order) == 4
    assert order.count("r1") == order.count("r2") == 4


def test_new_runs_go_to_the_worker_with_the_fewest():
    queues = [QueueView(key, "a", "small", works(1.0)) for key in ("x", "y", "z")]
    workers = [
        WorkerView("busy", frozenset(["small"]), 9, 2),
        WorkerView("idle", frozenset(["small"]), 9, 0),
    ]
    assignments = plan(queues, workers, FairShares()).assignments
    assert [assignment.worker_id for assignment in assignments] == ["idle", "idle", "busy"]


def test_a_run_goes_back_to_whoever_gave_it_up_only_if_there_is_nobody_else():
    def where(queue: QueueView, *workers: WorkerView) -> list[str]:
        return [each.worker_id for each in plan([queue], workers, FairShares()).assignments]

    models = frozenset(MODELS)
    sick, well = WorkerView("sick", models, 4, 0), WorkerView("well", models, 4, 7)
    run = QueueView("run", "a", "small", works(1), avoids=frozenset({"sick"}))
    assert where(run, sick, well) == ["well"]
    assert where(run, sick, replace(well, credits=0)) == [], "it waits"
    assert where(run, sick, replace(well, models=frozenset({"large"}))) == ["sick"]
    assert where(run, sick) == ["sick"]
    assert where(replace(run, worker_id="sick"), sick, well) == ["sick"], "it is there by now"


def test_nor_does_it_while_the_others_wait_for_company():
    models = frozenset(MODELS)
    sick = WorkerView("sick", models, 4, 0)
    well = WorkerView("well", models, 1, 7, 100.0, idle=True, company=models)
    small = [Work(1, Kind.GRADIENT)]
    run = QueueView("run", "b", "small", works(1), avoids=frozenset({"sick"}))
    other = QueueView("other", "a", "small", small, worker_id="well")
    decided = plan([run, other], [sick, well], FairShares(), 0.0, 1.0)
    assert decided.wake_at_s == 1.0
    assert decided.assignments == []
    later = plan([run, other], [sick, well], FairShares(), 2.0, 1.0)
    assert {each.worker_id for each in later.assignments} == {"well"}


def test_and_waits_for_nobody_elses_company():
    models = frozenset(MODELS)
    sick, well = WorkerView("sick", models, 4, 0), WorkerView("well", models, 4, 7)
    waiting = WorkerView("waiting", models, 1, 9, 100.0, idle=True, company=models)
    small = QueueView("other", "a", "small", [Work(1, Kind.GRADIENT)], worker_id="waiting")
    run = QueueView("run", "b", "small", works(1), avoids=frozenset({"sick"}))

    def where(*workers: WorkerView) -> dict[str, str]:
        decided = plan([run, small], [*workers, waiting], FairShares(), 0.0, 1.0)
        assert decided.wake_at_s == 1.0
        return {each.key: each.worker_id for each in decided.assignments}

    assert where(sick, well) == {"run": "well"}
    assert where(sick, replace(well, credits=0)) == {}, "it would be the next one's"
    assert where(sick, replace(well, models=frozenset({"large"}))) == {}
    only_large = replace(waiting, models=frozenset({"large"}), company=frozenset({"large"}))
    large = replace(small, model="large")
    decided = plan([run, large], [sick, only_large], FairShares(), 0.0, 1.0)
    assert [(each.key, each.worker_id) for each in decided.assignments] == [("run", "sick")]


@settings(deadline=None)
@given(fleets(), st.data())
def test_a_suspect_comes_alone_and_holds_nothing_up(
    fleet: tuple[list[QueueView], list[WorkerView]], data: st.DataObject
):
    queues = [replace(queue, suspect=data.draw(st.booleans())) for queue in fleet[0]]
    arrivals = st.sampled_from(Arrivals)
    workers = [replace(worker, arrivals=data.draw(arrivals)) for worker in fleet[1]]
    assignments = plan(queues, workers, FairShares()).assignments
    homeless = {queue.key: queue for queue in queues if queue.worker_id is None}
    taken = Counter(assignment.key for assignment in assignments)
    used = Counter(assignment.worker_id for assignment in assignments)
    for worker in workers:
        keys = {one.key for one in assignments if one.worker_id == worker.id} & set(homeless)
        coming = [homeless[key] for key in keys]
        if worker.arrivals is Arrivals.SUSPECT:
            assert not coming
        elif any(queue.suspect for queue in coming):
            assert worker.arrivals is Arrivals.NONE
            assert len(coming) == 1
    # Whoever is at home is served before a credit stays unused.
    for queue in queues:
        if queue.worker_id is not None and taken[queue.key] < len(queue.works):
            assert all(used[w.id] == w.credits for w in workers if w.id == queue.worker_id)
