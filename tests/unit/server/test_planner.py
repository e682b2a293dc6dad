"""Properties of the planner: a pure function, so no server is needed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tensafe_server.planning.planner import FairShares, QueueView, WorkerView, plan

MODELS = ("small", "large")


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
            draw(st.lists(st.floats(1, 100), max_size=8)),
            draw(homes),
        )
        for number in range(draw(st.integers(0, 6)))
    ]
    return queues, workers


@given(fleets())
def test_plans_keep_to_credits_models_and_homes(fleet: tuple[list[QueueView], list[WorkerView]]):
    queues, workers = fleet
    assignments, _ = plan(queues, workers, FairShares())
    by_key = {queue.key: queue for queue in queues}
    by_id = {worker.id: worker for worker in workers}
    given_to = Counter(assignment.worker_id for assignment in assignments)
    taken = Counter(assignment.key for assignment in assignments)
    homes: dict[str, str] = {}
    for worker, count in given_to.items():
        assert count <= by_id[worker].credits
    for key, count in taken.items():
        assert count <= len(by_key[key].costs)
    for assignment in assignments:
        queue = by_key[assignment.key]
        assert homes.setdefault(assignment.key, assignment.worker_id) == assignment.worker_id
        if queue.worker_id is None:
            assert queue.model in by_id[assignment.worker_id].models
        else:
            assert assignment.worker_id == queue.worker_id


@given(fleets())
def test_no_credit_stays_unused_while_work_could_use_it(
    fleet: tuple[list[QueueView], list[WorkerView]],
):
    queues, workers = fleet
    assignments, _ = plan(queues, workers, FairShares())
    taken = Counter(assignment.key for assignment in assignments)
    used = Counter(assignment.worker_id for assignment in assignments)
    home = {assignment.key: assignment.worker_id for assignment in assignments}
    for queue in queues:
        if taken[queue.key] == len(queue.costs):
            continue
        bound = queue.worker_id or home.get(queue.key)
        able = [w for w in workers if (w.id == bound if bound else queue.model in w.models)]
        assert all(used[w.id] == w.credits for w in able)


@given(st.floats(1, 50), st.floats(1, 50), st.integers(20, 60))
def test_tenants_get_equal_cost_not_equal_counts(cost_a: float, cost_b: float, rounds: int):
    queues = [
        QueueView("a", "a", "small", [cost_a] * 500),
        QueueView("b", "b", "small", [cost_b] * 500),
    ]
    shares = FairShares()
    served = Counter[str]()
    for _ in range(rounds):
        assignments, shares = plan(queues, [WorkerView("w", frozenset(["small"]), 2, 0)], shares)
        for assignment in assignments:
            served[assignment.key] += cost_a if assignment.key == "a" else cost_b
    assert abs(served["a"] - served["b"]) <= 2 * max(cost_a, cost_b) + 1e-6


def test_an_idle_tenant_saves_nothing_up():
    worker = WorkerView("w", frozenset(["small"]), 4, 0)
    shares = FairShares()
    for _ in range(100):
        _, shares = plan([QueueView("a", "a", "small", [10.0] * 4)], [worker], shares)
    both = [QueueView("a", "a", "small", [10.0] * 9), QueueView("b", "b", "small", [10.0] * 9)]
    assignments, _ = plan(both, [worker], shares)
    assert Counter(assignment.key for assignment in assignments)["a"] >= 1


def test_a_tenants_runs_take_turns():
    queues = [QueueView(key, "a", "small", [1.0] * 5) for key in ("x", "y")]
    worker = WorkerView("w", frozenset(["small"]), 4, 0)
    assignments, _ = plan(queues, [worker], FairShares())
    assert [assignment.key for assignment in assignments] == ["x", "y", "x", "y"]


def test_new_runs_go_to_the_worker_with_the_fewest():
    queues = [QueueView(key, "a", "small", [1.0]) for key in ("x", "y", "z")]
    workers = [
        WorkerView("busy", frozenset(["small"]), 9, 2),
        WorkerView("idle", frozenset(["small"]), 9, 0),
    ]
    assignments, _ = plan(queues, workers, FairShares())
    assert [assignment.worker_id for assignment in assignments] == ["idle", "idle", "busy"]
