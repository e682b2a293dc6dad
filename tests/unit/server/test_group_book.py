"""What the coordinator knows of a worker's groups, and what it tells the planner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import worker_pb2 as pb
from tensafe_server.fleet.groups import GroupBook
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.works import company, work_of
from tensafe_server.operations.model import PendingOperation
from tensafe_server.planning.views import GroupView, Kind, SampleRoom, Work

GRADIENT, UPDATE = Work(30.0, Kind.GRADIENT), Work(16.0, Kind.UPDATE)


def run_of(**config) -> Any:
    return SimpleNamespace(
        model="m",
        config=training.RunConfig(**config),
        queue=[],
        in_flight=[],
        active_s=10.0,
        deleted=False,
    )


def pending(kind: int) -> PendingOperation:
    row = cast(Any, SimpleNamespace(id="op", kind=kind, cost=30.0))
    return PendingOperation(row, b"", "m")


def test_the_first_group_is_begun_and_the_others_wait_until_they_start():
    book = GroupBook()
    book.put("a1", 1, GRADIENT, "m")
    book.put("b1", 1, GRADIENT, "m")
    book.put("a2", 2, UPDATE, "m")
    book.put("c1", 3, GRADIENT, "m")
    assert book.next == 4
    assert book.plans == 2
    assert book.first() == {"a1", "b1"}
    assert book.number_of("a2") == 2
    assert [view.number for view in book.waiting()] == [2, 3]
    book.put("d1", 3, GRADIENT, "m")
    assert book.waiting()[1] == GroupView(3, Kind.GRADIENT, "m", 60.0)
    book.started("c1")
    assert [view.number for view in book.waiting()] == [2]


def test_a_group_is_gone_with_its_last_operation():
    book = GroupBook()
    for operation_id, number, work in [("a1", 1, GRADIENT), ("b1", 1, GRADIENT), ("a2", 2, UPDATE)]:
        book.put(operation_id, number, work, "m")
    book.ended("a1")
    book.ended("a1")
    book.ended("unknown")
    assert book.first() == {"b1"}
    assert book.plans == 1
    book.ended("b1")
    assert book.first() == {"a2"}
    assert (book.plans, book.waiting(), book.number_of("b1")) == (0, [], 0)
    book.ended("a2")
    assert book.first() == set()
    assert book.next == 3


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (ops.OPERATION_KIND_FORWARD_BACKWARD, {}, Kind.GRADIENT),
        (ops.OPERATION_KIND_FORWARD_BACKWARD, {"deterministic": True}, None),
        (ops.OPERATION_KIND_OPTIM_STEP, {"deterministic": True}, Kind.UPDATE),
        (ops.OPERATION_KIND_FORWARD, {}, None),
        (ops.OPERATION_KIND_SAVE_STATE, {}, None),
        (ops.OPERATION_KIND_SAMPLE, {"deterministic": True}, Kind.SAMPLE),
    ],
)
def test_what_may_have_company(kind, config, expected):
    assert work_of(pending(kind), run_of(**config)) == Work(30.0, expected)


def test_what_may_have_killed_a_worker_goes_alone():
    operation = pending(ops.OPERATION_KIND_FORWARD_BACKWARD)
    operation.losses.add("1", running=True)
    assert work_of(operation, run_of()).kind is None
    # A sample is beside everything: it is not to take a plan's place for as long as it lasts.
    sample = pending(ops.OPERATION_KIND_SAMPLE)
    sample.losses.add("1", running=True)
    assert work_of(sample, None).kind is Kind.SAMPLE


SAMPLE = Work(50.0, Kind.SAMPLE)


def test_a_sample_that_has_begun_is_beside_the_groups():
    book = GroupBook(generates=True)
    for operation_id, number, work in [("s1", 1, SAMPLE), ("a1", 2, GRADIENT), ("s2", 3, SAMPLE)]:
        book.put(operation_id, number, work, "m")
    assert book.plans == 1
    assert book.first() == {"s1"}
    book.started("s1")
    assert book.first() == {"a1"}
    assert [view.number for view in book.waiting()] == [3]
    book.ended("s1")
    assert book.next == 4


def test_a_worker_that_samples_one_by_one_counts_samples_as_plans():
    book = GroupBook()
    book.put("s1", 1, SAMPLE, "m")
    book.started("s1")
    assert (book.plans, book.first()) == (1, {"s1"})


def test_a_worker_takes_samples_until_it_is_full_twice_and_never_with_all_credits():
    link = WorkerLink("w", pb.Register(credits=8, sample_tokens=100, group_tokens=9))
    assert link.view().samples == SampleRoom(200.0, 4)
    assert link.idle
    for number in range(3):
        link.give(f"s{number}", SAMPLE)
    link.give("a1", GRADIENT)
    assert link.view().samples == SampleRoom(50.0, 1)
    assert link.view().credits == 4
    assert not link.idle  # it has more to do than to wait for company
    link.free("s1")
    link.free("s1")
    link.free("a1")
    assert link.view().samples == SampleRoom(100.0, 2)
    assert WorkerLink("w", pb.Register(credits=8)).view().samples is None


def test_company_are_runs_that_were_active_and_have_nothing_queued():
    link = WorkerLink("w", pb.Register(group_tokens=100, credits=4))
    link.runs = {"r"}

    def found(run) -> frozenset[str]:
        return company(link, cast(Any, SimpleNamespace(runs={"r": run})), 9.0)

    assert found(run_of()) == {"m"}
    assert found(run_of(deterministic=True)) == set()
    for change, expected in [
        ({"queue": ["op"]}, set()),
        ({"active_s": 8.0}, set()),
        ({"active_s": 8.0, "in_flight": ["its outcome is being written"]}, {"m"}),
        ({"deleted": True}, set()),
    ]:
        run = run_of()
        vars(run).update(change)
        assert found(run) == expected


def test_a_worker_without_groups_is_shown_as_ever():
    view = WorkerLink("w", pb.Register(models=["m"], credits=4)).view()
    assert (view.credits, view.group_cost, view.idle) == (4, 0.0, False)
    view = WorkerLink("w", pb.Register(models=["m"], credits=4, group_tokens=100)).view()
    assert (view.group_cost, view.idle, view.next_group) == (300.0, True, 1)
