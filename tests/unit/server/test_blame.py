"""Which losses count against what, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from unit.server.small_store import Small, operation

from tensafe.v1 import worker_pb2 as pb
from tensafe_server.fleet.blame import Blame
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.operations.model import RUNNING, Losses, PendingOperation
from tensafe_server.operations.outcomes import Ending
from tensafe_server.planning.views import Arrivals
from tensafe_server.store.base import AttemptRow

NO_TIME = 0.0


class Court:
    """Blame over a small store, whose run has two operations with a worker."""

    def __init__(self, small: Small, return_s: float = 3600.0) -> None:
        self.small = small
        self.run = small.run_state
        self.blame = Blame(small.store, small.ledger, return_s)
        self.verdict: asyncio.Future[Sequence[Ending]] = asyncio.Future()
        self.acquittals = 0
        self.blame.on_verdict = self.verdict.set_result
        self.blame.on_acquitted = self._acquit
        self.operations = [PendingOperation(operation(seq), None, "m") for seq in (1, 2)]
        for one in self.operations:
            small.ledger.reserve(one, self.run)
        small.ledger.admit(self.operations)

    def _acquit(self) -> None:
        self.acquittals += 1

    def link(self, instance: str) -> WorkerLink:
        link = WorkerLink(f"wkr-{instance}", pb.Register(instance=instance, name=f"of {instance}"))
        link.runs.add(self.run.id)
        return link

    def lose(
        self, instance: str, *, running: bool = False, checking: bool = False, gone: bool = True
    ) -> list[Ending]:
        """A worker is lost that had both, and had begun with the first one or not said so."""
        link = self.link(instance)
        if running:
            self.operations[0].row.state = RUNNING
            self.blame.began(link, self.operations[:1])
        self.blame.lost(link, self.operations, checking=checking, gone=gone)
        self.operations[0].row.state = 1
        return self.blame.verdicts()

    async def bring(self, instance: str) -> None:
        """The run is on its way to a worker."""
        await self.blame.expected(self.link(instance), self.run)
        self.run.arriving = True

    async def on_disk(self) -> set[AttemptRow]:
        await self.small.store.flushed()
        return set(await self.small.store.attempts())


def losses(**workers: bool) -> Losses:
    counted = Losses()
    for worker, running in workers.items():
        counted.add(worker, running=running)
    return counted


@pytest.mark.parametrize(
    ("counted", "too_many"),
    [
        (losses(a=True), False),
        (losses(a=True, b=True), True),
        (losses(a=True, b=False), False),
        (losses(a=False, b=False), False),
        (losses(a=False, b=False, c=False), True),
        (losses(a=True, b=False, c=False), True),
    ],
)
def test_how_many_are_too_many(counted: Losses, too_many: bool):
    assert counted.too_many is too_many
    counted.add("a", running=False)
    assert counted.too_many is too_many, "the same process counts once, for the worse"


def test_what_ran_is_blamed_and_not_what_was_next(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        assert court.lose("one", running=True) == []
        [ending] = court.lose("two", running=True)
        assert ending.operation is court.operations[0]
        assert ending.operation.void
        assert ending.error is not None
        assert ending.error.reason == "INTERNAL"
        assert not court.operations[1].losses

    Small.run(tmp_path, body)


def test_a_worker_that_was_checking_a_log_is_held_against_nothing_that_waits(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        for instance in ("one", "two", "three", "four"):
            assert court.lose(instance, checking=True) == []
        assert await court.on_disk() == set()

    Small.run(tmp_path, body)


def test_what_returns_or_leaves_was_not_lost(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        for instance in ("one", "two", "three"):
            assert court.lose(instance, running=True) == []
            court.blame.returned(instance)
            assert await court.on_disk() == set()
        assert not court.operations[0].losses

    Small.run(tmp_path, body)


def test_a_run_that_arrives_clears_itself_and_one_that_does_not_is_given_up(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        first, second = court.operations
        for instance in ("one", "two"):
            await court.bring(instance)
            assert court.lose(instance) == []
        assert len(court.run.losses) == 2
        court.blame.arrived(court.run)
        assert not court.run.losses
        court.blame.forget_arrivals()
        assert {row.subject for row in await court.on_disk()} == {first.row.id}
        first.losses.clear()
        for instance in ("three", "four"):
            await court.bring(instance)
            assert court.lose(instance) == []
        await court.bring("five")
        [ending] = court.lose("five")
        assert ending.operation is first, "what was next fails by itself first"
        await court.bring("six")
        court.blame.lost(court.link("six"), [second], gone=True)
        [ending] = court.blame.verdicts()
        assert ending.operation is second
        assert ending.error is not None
        assert "was being brought to a worker" in ending.error.message

    Small.run(tmp_path, body)


def test_the_planner_is_told_what_comes_to_a_worker(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        link = court.link("one")
        assert court.blame.arrivals(link) is Arrivals.NONE
        court.run.restoring = True
        assert court.blame.arrivals(link) is Arrivals.RUNS
        assert court.blame.arrivals(WorkerLink("wkr-2", pb.Register())) is Arrivals.NONE
        court.run.losses.add("before", running=False)
        assert court.blame.arrivals(link) is Arrivals.SUSPECT
        court.run.restoring = False
        await court.bring("one")
        assert court.blame.arrivals(link) is Arrivals.SUSPECT
        for one in court.operations:  # nothing of it will ever tell that it is there
            one.void = True
        assert court.blame.arrivals(link) is Arrivals.NONE

    Small.run(tmp_path, body)


def test_a_new_coordinator_goes_on_counting(tmp_path: Path):
    async def body(small: Small) -> None:
        before = Court(small)
        assert before.lose("one", running=True) == []
        before.blame.began(before.link("two"), before.operations[:1])  # both die
        await before.on_disk()
        small.ledger = type(small.ledger)()
        small.ledger.runs["run-1"] = small.run_state
        small.run_state.queue.clear()
        small.run_state.next_seq = 1
        after = Court(small, return_s=NO_TIME)
        await after.blame.load()
        assert after.operations[0].on_trial
        assert not after.operations[1].on_trial
        assert [ending.operation for ending in await after.verdict] == after.operations[:1]

    Small.run(tmp_path, body)


def test_a_worker_that_is_back_ends_the_trial(tmp_path: Path):
    async def body(small: Small) -> None:
        before = Court(small)
        before.lose("one", running=True)
        before.blame.began(before.link("two"), before.operations[:1])
        before.blame.began(before.link("two"), [PendingOperation(operation(9), None, "m")])
        await before.on_disk()
        small.ledger = type(small.ledger)()
        small.ledger.runs["run-1"] = small.run_state
        small.run_state.queue.clear()
        small.run_state.next_seq = 1
        after = Court(small)
        await after.blame.load()
        assert after.operations[0].on_trial
        after.blame.returned("two")
        assert not after.operations[0].on_trial
        assert after.acquittals == 1
        # What is unknown (seq 9) was dropped, and so was what the living one is at.
        assert await after.on_disk() == {AttemptRow("op-run-1-1", "one", True)}

    Small.run(tmp_path, body)


def test_whoever_may_be_back_is_waited_for(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        for instance in ("one", "two"):
            assert court.lose(instance, running=True, gone=False) == []
        assert court.operations[0].on_trial
        court.blame.returned("one")
        assert not court.operations[0].on_trial
        assert court.acquittals == 1
        assert court.lose("three", running=True, gone=False) == []
        court.blame.gone("two")
        assert court.operations[0].on_trial, "the other one may still be back"
        assert not court.verdict.done()
        court.blame.gone("three")
        assert [ending.operation for ending in await court.verdict] == court.operations[:1]
        assert not court.operations[0].on_trial

    Small.run(tmp_path, body)


def test_whoever_is_not_back_in_time_was_lost(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small, return_s=NO_TIME)
        for instance in ("one", "two"):
            assert court.lose(instance, running=True, gone=False) == []
        assert [ending.operation for ending in await court.verdict] == court.operations[:1]

    Small.run(tmp_path, body)


def test_another_process_under_its_name_says_that_a_worker_is_gone(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        for instance in ("one", "two"):
            assert court.lose(instance, running=True, gone=False) == []
            court.blame.replaced("")
            court.blame.replaced("of three")
        court.blame.replaced("of two")
        assert not court.verdict.done()
        court.blame.replaced("of one")
        assert [ending.operation for ending in await court.verdict] == court.operations[:1]

    Small.run(tmp_path, body)


def test_a_run_is_not_convicted_for_what_an_operation_has_done(tmp_path: Path):
    async def body(small: Small) -> None:
        court = Court(small)
        for instance in ("one", "two", "three"):
            await court.bring(instance)
            assert court.lose(instance, gone=False) == []
        for instance in ("one", "two", "three"):
            court.blame.gone(instance)
        [ending] = await court.verdict
        assert ending.operation is court.operations[0]
        assert not court.run.on_trial
        assert not court.operations[1].void

    Small.run(tmp_path, body)
