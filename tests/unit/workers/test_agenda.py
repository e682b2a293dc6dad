"""The order in which a worker takes what it is given."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from unit.workers.planned import assignment, operation, plan

from tensafe.v1 import training_pb2
from workers.agenda import Agenda, Release

OPTIM = {"optim_step": training_pb2.OptimStep()}


def optim(run: str, group: int):
    return operation(1, run, **OPTIM, operation_id=f"{run}@{group}", group=group)


def taken(agenda: Agenda) -> list[list[str]]:
    found = []
    while agenda:
        found.append([getattr(item, "operation_id", item) for item in agenda.take()])
    return found


def test_groups_come_in_their_order_and_gather_what_came_late():
    agenda = Agenda()
    agenda.put(1, plan(optim("a", 1), optim("a", 2)))
    agenda.put(1, plan(optim("b", 2), optim("b", 3)))
    agenda.put(1, plan(optim("c", 1)))
    assert taken(agenda) == [["a@1", "c@1"], ["a@2", "b@2"], ["b@3"]]


def test_what_comes_too_late_for_its_group_is_next():
    agenda = Agenda()
    agenda.put(1, plan(optim("a", 1), optim("a", 3)))
    assert [item.operation_id for item in agenda.take()] == ["a@1"]
    agenda.put(1, plan(optim("b", 1)))
    assert taken(agenda) == [["b@1"], ["a@3"]]


def test_what_has_no_group_comes_first_plan_by_plan():
    agenda = Agenda()
    agenda.put(1, plan(optim("a", 4)))
    agenda.put(1, plan(optim("b", 0), optim("c", 0), runs=[assignment("b")]))
    agenda.put(1, Release("d"))
    first, second, third = [agenda.take(), agenda.take(), agenda.take()]
    assert [type(item).__name__ for item in first] == ["RunAssignment"] + 2 * ["PlannedOperation"]
    assert second == [Release("d")]
    assert third[0].operation_id == "a@4"


def test_a_new_stream_numbers_anew_behind_what_the_old_one_sent():
    agenda = Agenda()
    agenda.put(1, plan(optim("a", 7)))
    agenda.put(2, plan(optim("b", 1), optim("b", 7)))
    assert taken(agenda) == [["a@7"], ["b@1"], ["b@7"]]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=30)
)
def test_nothing_is_lost_and_a_runs_later_groups_stay_later(script):
    """None takes, a list is a plan whose operations are in those groups."""
    agenda, put, got = Agenda(), [], []
    for step in script:
        if step is None:
            got += agenda.take() if agenda else []
            continue
        operations = [optim(f"r{len(put)}", group) for group in sorted(step)]
        put += operations
        agenda.put(1, plan(*operations))
    while agenda:
        got += agenda.take()
    assert sorted(item.operation_id for item in got) == sorted(item.operation_id for item in put)
    positions = {item.operation_id: place for place, item in enumerate(got)}
    for first, second in pairwise(put):
        same_run = first.operation_id.split("@")[0] == second.operation_id.split("@")[0]
        if same_run and first.group < second.group:
            assert positions[first.operation_id] < positions[second.operation_id]
