"""Sends work to workers whenever something changes: new operations, free credits, new workers.

There is one wake-up path, `kick`, and it costs one pass of the planner however many kicks arrive in
one turn of the event loop. What waits for company has one timer for all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.blame import Blame
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.restore import Onward, Restorer
from tensafe_server.fleet.works import company, work_of
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import QUEUED, PendingOperation, RunState
from tensafe_server.operations.specs import SpecReader
from tensafe_server.operations.voids import is_void, void_spec
from tensafe_server.planning.fairness import FairShares
from tensafe_server.planning.planner import plan
from tensafe_server.planning.views import Arrivals, Assignment, QueueView, WorkerView
from tensafe_server.privacy.steps import PrivateSteps
from tensafe_server.store.base import Store

log = logging.getLogger(__name__)
_LOOK_AHEAD = 1024
_RETRY_S = 1.0
_FETCH_AHEAD = 8
_MOST_GIVEN_UP = 3


@dataclass(frozen=True, slots=True)
class CompanyPolicy:
    """How long small operations wait for others to be executed with.

    Attributes:
        wait_s: at most so long, and only if the worker has nothing else to do; 0: never.
        memory_s: only for runs of which an operation ended at most so long ago.
    """

    wait_s: float = 0.004
    memory_s: float = 0.04


class Dispatcher:
    """Gives operations to workers.

    Attributes:
        on_unrestorable: called with operations that cannot run, since the state of their run that
            they need is lost, and why.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        restorer: Restorer,
        specs: SpecReader,
        policy: CompanyPolicy,
        blame: Blame,
        private: PrivateSteps,
    ) -> None:
        self._store = store
        self._private = private
        self._policy = policy
        self._timer: asyncio.TimerHandle | None = None
        self._ledger = ledger
        self._restorer = restorer
        self._specs = specs
        self._blame = blame
        self._links: dict[str, WorkerLink] = {}
        self._greeted: dict[str, WorkerLink] = {}
        self._shares = FairShares()
        self._kicked = False
        self._arrival = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_unrestorable: Callable[[Sequence[PendingOperation], TenSafeFault], None]
        self.on_unrestorable = lambda operations, fault: None

    @property
    def links(self) -> list[WorkerLink]:
        return list(self._links.values())

    def kick(self) -> None:
        """Plans at the end of this turn of the event loop."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def greet(self, link: WorkerLink) -> None:
        """The worker is being given back what it has. Until `add` it gets nothing new, and what it
        has by then may be cancelled, or taken back, as any other's."""
        self._greeted[link.id] = link

    def dismiss(self, link: WorkerLink) -> None:
        """That broke off: it comes back with all that it has."""
        del self._greeted[link.id]
        self._ledger.recall(link.id)

    def add(self, link: WorkerLink) -> None:
        self._greeted.pop(link.id, None)
        self._links[link.id] = link
        self._arrival.set()
        self.kick()

    async def wait_for(self, workers: int) -> None:
        """Returns when so many workers are connected."""
        while len(self._links) < workers:
            self._arrival.clear()
            await self._arrival.wait()

    def remove(self, link: WorkerLink) -> None:
        """Takes back what a lost worker had: its runs go on elsewhere, or when it is back."""
        if self._links.pop(link.id, None) is None:
            return
        held = self._ledger.recall(link.id)
        log.info("worker %s (%s) left; it held %d runs", link.id, link.name, len(held))
        self.kick()

    def release(self, run: RunState) -> None:
        """Tells the worker of a deleted run to forget it."""
        link = self._find(run.worker_id)
        if link is not None:
            link.runs.discard(run.id)
            link.send(pb.ConnectResponse(release=pb.ReleaseRun(run_id=run.id)))
        run.worker_id = None

    def give_back(self, run: RunState) -> None:
        """Takes a run back from the worker that was to hold it; its next one gets it anew."""
        link = self._find(run.worker_id)
        for operation in self._ledger.recall_run(run):
            if link is not None:
                link.free(operation.row.id)
                link.groups.ended(operation.row.id)
        if link is not None:
            link.runs.discard(run.id)

    def try_elsewhere(self, operation: PendingOperation, link: WorkerLink) -> bool:
        """Gives an operation without a place in a run, for which its worker has no room, to one
        that has not been tried with it; False if there is none."""
        operation.no_room_at.add(link.instance)
        left = [one for one in self._links.values() if one.instance not in operation.no_room_at]
        if not _serves(operation.model, left):
            return False
        self._ledger.recall_alone(operation)
        operation.row.state = QUEUED
        link.free(operation.row.id)
        self.kick()
        return True

    def rest(self, run: RunState, fault: TenSafeFault, at: PendingOperation | None = None) -> None:
        """Takes a run back that its worker did not bring to where the log has it: it is tried again
        in a moment. After several times what waits of it fails; nothing of the run changes. If it
        came as far as the operation `at`, and no further, that alone fails."""
        link = self._find(run.worker_id)
        run.given_up.append(link.instance if link is not None else "")
        self.give_back(run)
        run.resting = True
        asyncio.get_running_loop().call_later(_RETRY_S, self._go_on, run)
        if len(run.given_up) < _MOST_GIVEN_UP:
            return
        if at is not None and at in run.queue and not at.void:
            self.on_unrestorable([at], _not_told(at, run, fault))
            run.given_up.clear()
        else:
            self.on_unrestorable(list(run.queue), _not_brought(run, fault))

    def _go_on(self, run: RunState) -> None:
        run.resting = False
        self.kick()

    def dispute(self, run: RunState) -> None:
        """Takes a run back from whoever holds it, or comes back with it, also after a restart: its
        epoch is over."""
        link = self._find(run.worker_id)
        if run.worker_id is not None:
            self.give_back(run)
        if link is not None:  # nobody asks for what it has any more
            link.send(pb.ConnectResponse(release=pb.ReleaseRun(run_id=run.id)))
        self._store.set_run_epoch(run.id, run.begin_epoch())

    def link_of(self, operation: PendingOperation) -> WorkerLink | None:
        return self._find(operation.worker_id)

    def _find(self, worker_id: str | None) -> WorkerLink | None:
        return self._links.get(worker_id or "") or self._greeted.get(worker_id or "")

    def _dispatch(self) -> None:
        self._kicked = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._links:
            return
        most = max(link.free_credits for link in self._links.values())
        if not most:
            return
        queues, runs, lane = self._queue_views(min(most, _LOOK_AHEAD))
        if not queues:
            return
        now_s = time.monotonic()
        bringing = any(queue.worker_id is None and not queue.is_lane for queue in queues)
        workers = [self._worker_view(link, now_s, bringing) for link in self._links.values()]
        decided = plan(queues, workers, self._shares, now_s, self._policy.wait_s)
        self._shares = decided.shares
        if decided.wake_at_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(decided.wake_at_s - now_s, self.kick)
        plans: dict[str, pb.Plan] = defaultdict(pb.Plan)
        for assignment in decided.assignments:
            link = self._links[assignment.worker_id]
            run = runs.get(assignment.key)
            if run is None:
                self._take_lane(lane[assignment.key], link, plans[link.id], assignment)
            elif run.worker_id is None:
                self._place(run, link, plans[link.id], assignment)
            elif not run.restoring:
                self._take_next(run, link, plans[link.id], assignment)
        for worker_id, message in plans.items():
            if message.runs or message.operations:
                self._links[worker_id].send_plan(message)

    def _worker_view(self, link: WorkerLink, now_s: float, bringing: bool) -> WorkerView:
        soon: frozenset[str] = frozenset()
        if self._policy.wait_s and link.idle:
            soon = company(link, self._ledger, now_s - self._policy.memory_s)
        # To find out what is coming takes a look at each of its runs.
        return link.view(soon, self._blame.arrivals(link) if bringing else Arrivals.NONE)

    def _queue_views(
        self, look_ahead: int
    ) -> tuple[list[QueueView], dict[str, RunState], dict[str, PendingOperation]]:
        ready = self._ledger.ready_runs()
        runs = {run.id: run for run in ready if not _is_away(run)}
        views = []
        for run in runs.values():
            # However many before it are void: nothing comes after them by itself.
            waiting: Sequence[PendingOperation] = list(
                islice((p for p in run.queue if not p.void), look_ahead)
            )
            if not waiting:
                self._ledger.rest(run)
                continue
            waiting = list(takewhile(lambda p: not p.on_trial, waiting))
            if not waiting or waiting[0].fetching:
                continue  # its spec is on its way, or the verdict is, and so is a kick
            if run.private is not None:
                waiting = self._private.sendable(run, waiting, _serves(run.model, self.links))
                if not waiting:
                    continue  # it is being prepared, and then comes a kick
            views.append(
                QueueView(
                    run.id,
                    run.tenant_id,
                    run.model,
                    [p.work or work_of(p, run) for p in waiting],
                    run.worker_id,
                    self._last_group(run),
                    waiting[0].ready_s,
                    bool(run.losses),
                    avoids=self._avoided(run),
                )
            )
        lane = {
            p.row.id: p
            for p in islice(self._ledger.lane, _LOOK_AHEAD)
            if not (p.void or p.fetching or p.on_trial)
        }
        for operation in lane.values():
            row = operation.row
            work = operation.work or work_of(operation, None)
            views.append(
                QueueView(
                    *(row.id, row.tenant_id, operation.model, [work]),
                    is_lane=True,
                    avoids=self._ids_of(operation.no_room_at),
                )
            )
        return views, runs, lane

    def _avoided(self, run: RunState) -> frozenset[str]:
        """Workers that have given the run up since it last went on, or could not load a snapshot of
        it."""
        return self._ids_of(set(run.given_up).union(*run.useless_snapshots.values()))

    def _ids_of(self, instances: Collection[str]) -> frozenset[str]:
        """The workers, by their processes."""
        if not instances:
            return frozenset()
        return frozenset(one.id for one in self._links.values() if one.instance in instances)

    def _last_group(self, run: RunState) -> int:
        link = self._find(run.worker_id)
        if link is None or not link.group_cost:
            return 0
        numbers = (link.groups.number_of(p.row.id) for p in reversed(run.in_flight))
        return next((number for number in numbers if number), 0)

    def _place(self, run: RunState, link: WorkerLink, message: pb.Plan, place: Assignment) -> None:
        """Gives a run that no worker holds to one; its first operation follows."""
        run.worker_id = link.id
        link.runs.add(run.id)
        is_new = not (run.epoch or run.epochs_unwritten)
        self._store.set_run_epoch(run.id, run.begin_epoch())
        if is_new and not self._restorer.needed(run):
            message.runs.append(pb.RunAssignment(run_id=run.id, epoch=run.epoch, config=run.config))
            self._take_next(run, link, message, place)
            return
        run.restoring = True
        task = asyncio.get_running_loop().create_task(self._restore(run, link, run.epoch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restore(self, run: RunState, link: WorkerLink, epoch: int) -> None:
        try:
            onward = await self._restorer.plan(run, epoch, link.instance)
        except Exception as error:
            if run.worker_id == link.id and run.epoch == epoch:
                self.give_back(run)
                self._cannot_restore(run, error)
            return
        if run.worker_id == link.id and run.epoch == epoch:
            await self._blame.expected(link, run)
        if run.worker_id == link.id and run.epoch == epoch:
            self.bring(run, link, onward)
            run.restoring, run.arriving = False, True
            self.kick()

    def bring(self, run: RunState, link: WorkerLink, onward: Onward) -> None:
        """Sends a worker to where a run stands: what is logged, and between it what was sent before
        and has not ended."""
        message = pb.Plan()
        if onward.assignment is not None:
            message.runs.append(onward.assignment)
        for operation, fault in onward.lost:
            if not operation.void:
                run.queue.remove(operation)
                self.on_unrestorable([operation], fault)
        logged = deque(onward.logged)
        while run.queue and (run.queue[0].row.seq or 0) <= onward.reached:
            operation = run.queue.popleft()
            seq = operation.row.seq or 0
            while logged and logged[0][0] < seq:
                message.operations.append(logged.popleft()[1])
            if logged and logged[0][0] == seq:  # it was void, and is in the log by now
                logged.popleft()
            self._bring_waiting(run, operation, onward.specs.get(operation.row.id), link, message)
        message.operations.extend(planned for _, planned in logged)
        if message.runs or message.operations:
            link.send_plan(message)

    def _bring_waiting(
        self,
        run: RunState,
        operation: PendingOperation,
        spec: bytes | None,
        link: WorkerLink,
        message: pb.Plan,
    ) -> None:
        if spec is None and not operation.void:
            self._specs.on_missing(operation)
        if operation.void or spec is None:
            _add_void(operation, run, message, 0)
            return
        self._ledger.hold(operation, spec)
        run.in_flight.append(operation)
        self._hand_over(operation, link, message, run.epoch, 0)

    def _cannot_restore(self, run: RunState, error: Exception) -> None:
        if isinstance(error, TenSafeFault) and error.detail.reason == "RUN_STATE_LOST":
            log.error("%s", error.detail.message)
            self.on_unrestorable(list(run.queue), error)
            return
        # Nothing is lost by waiting: a disk may come back.
        log.error("the state of %s cannot be read; trying again", run.id, exc_info=error)
        asyncio.get_running_loop().call_later(_RETRY_S, self.kick)

    def _take_next(
        self, run: RunState, link: WorkerLink, message: pb.Plan, place: Assignment
    ) -> None:
        following = next((p for p in run.queue if not p.void), None)
        if following is None:
            return
        if following.spec is None:
            self._fetch(run)
            return
        if not self._private.may_send(run, following):
            self.kick()  # it was placed for this, and is prepared now
            return
        # Only now, and into the same group, which may be another one the next time.
        while (operation := run.queue.popleft()) is not following:
            _add_void(operation, run, message, place.group)
        run.in_flight.append(operation)
        if place.group:
            work = work_of(operation, run)
            link.groups.put(operation.row.id, place.group, work, operation.model)
        self._hand_over(operation, link, message, run.epoch, place.group)
        if run.queue:
            later = run.queue[min(_FETCH_AHEAD, len(run.queue) - 1)]
            if later.spec is None and not (later.void or later.fetching):
                self._fetch(run)

    def _fetch(self, run: RunState) -> None:
        waiting = (p for p in run.queue if not p.void)
        self._specs.fetch(list(islice(waiting, 4 * _FETCH_AHEAD)))

    def _take_lane(
        self, operation: PendingOperation, link: WorkerLink, message: pb.Plan, place: Assignment
    ) -> None:
        if operation.spec is None:
            self._specs.fetch([operation])
            return
        self._ledger.lane.remove(operation)
        self._ledger.lane_in_flight[operation.row.id] = operation
        if place.group:
            work = work_of(operation, None)
            link.groups.put(operation.row.id, place.group, work, operation.model)
        self._hand_over(operation, link, message, 0, place.group)

    def _hand_over(
        self,
        operation: PendingOperation,
        link: WorkerLink,
        message: pb.Plan,
        epoch: int,
        group: int,
    ) -> None:
        row = operation.row
        spec = operation.spec or b""
        self._ledger.drop_spec(operation)
        operation.worker_id, operation.sent_under = link.id, epoch
        run = self._ledger.runs.get(row.run_id or "")
        link.give(row.id, operation.work or work_of(operation, run))
        planned = message.operations.add(
            operation_id=row.id,
            epoch=epoch,
            spec=spec,
            artifact_id=row.artifact_id or "",
            model_ref=operation.model if epoch == 0 else "",
            group=group,
        )
        self._private.dress(operation, planned)


def _serves(model: str, links: Iterable[WorkerLink]) -> bool:
    """Whether one of these workers takes on what runs on the model."""
    return any(model in one.models and not one.draining for one in links)


def _is_away(run: RunState) -> bool:
    """Whether nothing of a run may be sent just now."""
    return run.restoring or run.on_trial or run.resting


def _not_brought(run: RunState, fault: TenSafeFault) -> TenSafeFault:
    detail = fault.detail
    return TenSafeFault(
        detail.reason,
        f"the state of run {run.id} could not be rebuilt on a worker, {len(run.given_up)} times, "
        f"the last time since: {detail.message}. Nothing of it is lost: once the operator has "
        "found why, send what has failed again",
        run_id=run.id,
    )


def _not_told(operation: PendingOperation, run: RunState, fault: TenSafeFault) -> TenSafeFault:
    detail = fault.detail
    return TenSafeFault(
        detail.reason,
        f"operation {operation.row.id} was executed {len(run.given_up)} times, and nothing of it "
        f"could be told: {detail.message}. The run goes on from before it",
        operation_id=operation.row.id,
        run_id=run.id,
    )


def _add_void(operation: PendingOperation, run: RunState, message: pb.Plan, group: int) -> None:
    """Adds the hole that an operation leaves in its window, if it leaves one."""
    if is_void(operation.row, private=run.private is not None):
        message.operations.append(
            pb.PlannedOperation(
                operation_id=operation.row.id,
                epoch=run.epoch,
                spec=void_spec(operation.row),
                void=True,
                group=group,
            )
        )
