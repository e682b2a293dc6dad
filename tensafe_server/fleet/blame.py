"""Finds what takes one worker after the other: an operation, or bringing a run's state to them.

What a worker process was at is on disk while it is at it, and taken out when it has come through.
So nothing is forgotten if the coordinator dies in between, or together with the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tensafe.wire.status import ErrorDetail, TenSafeFault
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RUNNING, PendingOperation, RunState
from tensafe_server.operations.outcomes import Ending
from tensafe_server.planning.views import Arrivals
from tensafe_server.store.base import AttemptRow, Store

log = logging.getLogger(__name__)

Suspect = PendingOperation | RunState

RETURN_S = 15.0
"""How long a worker takes to come back at most: its own pauses and its channel's are 5 s each."""


@dataclass(frozen=True, slots=True)
class _Away:
    """A worker that was lost: its name, and the clock of its coming back."""

    name: str
    timer: asyncio.TimerHandle


class Blame:
    """Counts lost workers against what they were at.

    A worker that is lost may only have been cut off. Until it is known to be gone (another process
    has come under its name, it was told to end, or its time to come back is over), what too many of
    them have not told the end of is on trial, and nobody gets it.

    Args:
        return_s: how long workers have to come back after they were lost, or after a start of the
            coordinator.

    Attributes:
        on_verdict: called with the endings of what was on trial.
        on_acquitted: called when something on trial may be tried again.
    """

    def __init__(self, store: Store, ledger: Ledger, return_s: float = RETURN_S) -> None:
        self._store = store
        self._ledger = ledger
        self._return_s = return_s
        self._suspects: dict[str, Suspect] = {}
        self._recorded: set[str] = set()
        self._through: list[str] = []
        self._away: dict[str, _Away] = {}
        self.on_verdict: Callable[[Sequence[Ending]], None] = lambda endings: None
        self.on_acquitted: Callable[[], None] = lambda: None

    async def load(self) -> None:
        """Takes up what was on disk: processes that the last coordinator has not seen the end of.
        They count as lost until they are back."""
        for row in await self._store.attempts():
            suspect = self._ledger.pending(row.subject) or self._ledger.runs.get(row.subject)
            if suspect is None or (isinstance(suspect, RunState) and suspect.deleted):
                self._store.remove_attempts(row.subject)
                continue
            self._recorded.add(row.worker)
            self._expect_back(row.worker, "")
            suspect.attempted = True
            self._count(row.worker, suspect, running=row.running)
            log.info(
                "worker process %s was lost with %s, if it stays away", row.worker, row.subject
            )

    def began(self, link: WorkerLink, operations: Iterable[PendingOperation]) -> None:
        """A worker has begun these."""
        begun = [one for one in operations if not one.finishing]
        if begun:
            self._record(link, begun, running=True)

    async def expected(self, link: WorkerLink, run: RunState) -> None:
        """A run's state is about to be brought to a worker, which may have much to replay. Returns
        when that is on disk: whatever it takes with it is then counted."""
        await self._record(link, [run], running=False)

    def arrivals(self, link: WorkerLink) -> Arrivals:
        """What is on its way to a worker, as the planner sees it."""
        coming = [one for one in map(self._ledger.runs.get, link.runs) if one and _is_coming(one)]
        if any(one.losses for one in coming):
            return Arrivals.SUSPECT
        return Arrivals.RUNS if coming else Arrivals.NONE

    def arrived(self, run: RunState) -> None:
        """A run's worker has begun with the run's own work, or is not to take that state on."""
        if not run.arriving:
            return
        run.arriving = run.attempted = False
        run.losses.clear()
        self._suspects.pop(run.id, None)
        self._through.append(run.id)
        self.on_acquitted()

    def forget_arrivals(self) -> None:
        """Takes the runs that have arrived out of the store. Behind the record of what their
        workers have begun, so that at any instant one of the two is on disk."""
        for run_id in self._through:
            self._store.remove_attempts(run_id)
        self._through.clear()

    def lost(
        self,
        link: WorkerLink,
        held: Sequence[PendingOperation],
        *,
        checking: bool = False,
        gone: bool = False,
    ) -> None:
        """Counts the loss of a worker, for good if it is known to be `gone`.

        It is held against what it was running, and the samples that it generated beside that. A
        crash may be faster than the report of what began: without one, it is held, less heavily,
        against what was next and what was being brought to it; or against nothing, if it was
        `checking` a run's log and may have been at that.
        """
        if not gone:
            self._expect_back(link.instance, link.name)
        running = [one for one in held if one.row.state == RUNNING]
        beside = [one for one in running if one.is_sample and link.sample_cost]
        running = [one for one in running if one not in beside]
        suspects: list[Suspect] = [*running]
        if not (running or checking):
            head = link.groups.first()
            ahead = [one for one in held if one not in beside]
            suspects += [one for one in ahead if one.row.id in head] or ahead[:1]
            runs = [self._ledger.runs[run_id] for run_id in sorted(link.runs)]
            suspects += [run for run in runs if run.arriving]
        self._suspect(link, suspects, running=bool(running))
        self._suspect(link, beside, running=True)

    def _suspect(self, link: WorkerLink, suspects: Sequence[Suspect], *, running: bool) -> None:
        for suspect in suspects:
            self._count(link.instance, suspect, running=running)
            if isinstance(suspect, PendingOperation):
                suspect.work = None
        if suspects:
            names = ", ".join(map(_id, suspects))
            how = "running" if running else "perhaps at it"
            log.warning("worker %s (%s) was lost with %s: %s", link.id, link.name, names, how)
            self._record(link, suspects, running=running)

    def _count(self, worker: str, suspect: Suspect, *, running: bool) -> None:
        suspect.losses.add(worker, running=running)
        suspect.on_trial = suspect.losses.too_many
        self._suspects[_id(suspect)] = suspect

    def verdicts(self) -> list[Ending]:
        """The endings of what is on trial, once none of its workers may come back any more; they
        are void from here on.

        If an operation is among it, a run that came to the same workers may yet be innocent.
        """
        ripe = [
            one
            for one in self._suspects.values()
            if one.on_trial and self._away.keys().isdisjoint(one.losses.workers)
        ]
        operations = [one for one in ripe if isinstance(one, PendingOperation) and _is_open(one)]
        endings = [Ending(one, error=_deadly(one)) for one in operations]
        explained = {worker for one in operations for worker in one.losses.workers}
        for run in ripe:
            if isinstance(run, RunState) and explained.isdisjoint(run.losses.workers):
                error = _deadly_run(run)
                endings += [Ending(one, error=error) for one in run.queue if _is_open(one)]
        for ending in endings:
            if ending.error is not None:
                log.error("%s", ending.error.message)
            self._ledger.void(ending.operation)
        for suspect in ripe:
            suspect.on_trial = False
        return endings

    def returned(self, worker: str) -> None:
        """A process that was cut off is back, or it has handed back what it had: not lost."""
        self._end_wait(worker)
        if worker not in self._recorded:
            return
        self._recorded.discard(worker)
        self._store.remove_attempts_by(worker)
        for subject, suspect in list(self._suspects.items()):
            suspect.losses.forgive(worker)
            if isinstance(suspect, PendingOperation):
                suspect.work = None
            if not suspect.losses or not self._is_known(suspect):
                del self._suspects[subject]
            if suspect.on_trial and not suspect.losses.too_many:
                suspect.on_trial = False
                self.on_acquitted()

    def replaced(self, name: str) -> None:
        """A process that was not known has come under this name: whoever had it is gone."""
        for worker, away in list(self._away.items()):
            if name and away.name == name:
                self.gone(worker)

    def gone(self, worker: str) -> None:
        """A process that was lost does not come back."""
        if not self._end_wait(worker):
            return
        if endings := self.verdicts():
            self.on_verdict(endings)
        for subject in [
            one for one, suspect in self._suspects.items() if not self._is_known(suspect)
        ]:
            del self._suspects[subject]
        self.on_acquitted()

    def is_away(self, worker: str) -> bool:
        """Whether a process was lost and may come back."""
        return worker in self._away

    def _expect_back(self, worker: str, name: str) -> None:
        self._end_wait(worker)
        loop = asyncio.get_running_loop()
        self._away[worker] = _Away(name, loop.call_later(self._return_s, self.gone, worker))

    def _end_wait(self, worker: str) -> bool:
        """Whether it was waited for."""
        away = self._away.pop(worker, None)
        if away is not None:
            away.timer.cancel()
        return away is not None

    def _record(
        self, link: WorkerLink, suspects: Sequence[Suspect], *, running: bool
    ) -> asyncio.Future[None]:
        for suspect in suspects:
            suspect.attempted = True
        self._recorded.add(link.instance)
        rows = [AttemptRow(_id(one), link.instance, running) for one in suspects]
        return self._store.add_attempts(rows)

    def _is_known(self, suspect: Suspect) -> bool:
        return isinstance(suspect, RunState) or self._ledger.pending(suspect.row.id) is suspect


def _id(suspect: Suspect) -> str:
    return suspect.id if isinstance(suspect, RunState) else suspect.row.id


def _is_coming(run: RunState) -> bool:
    """Whether the run is on its way to its worker, which will tell of it."""
    waiting = any(not one.void for one in (*run.in_flight, *run.queue))
    return run.restoring or (run.arriving and waiting)


def _is_open(operation: PendingOperation) -> bool:
    return not (operation.void or operation.finishing)


def _deadly(operation: PendingOperation) -> ErrorDetail:
    return TenSafeFault(
        "INTERNAL",
        f"operation {operation.row.id} was running, or next, each of the {len(operation.losses)} "
        "times when its worker was lost, so it is not tried again; the run goes on from before it. "
        "Try a smaller batch, and tell the operator",
        operation_id=operation.row.id,
    ).detail


def _deadly_run(run: RunState) -> ErrorDetail:
    return TenSafeFault(
        "INTERNAL",
        f"the state of run {run.id} was being brought to a worker each of the {len(run.losses)} "
        "times when that was lost, so what waits of the run is not tried again. Nothing of it is "
        "lost: once the operator has found why (memory, for one), send the operations again",
        run_id=run.id,
    ).detail
