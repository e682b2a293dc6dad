"""Receives workers: registration, what they still hold, and their reports."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.blame import Blame
from tensafe_server.fleet.dispatcher import Dispatcher
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.liveness import Liveness
from tensafe_server.fleet.replay import ReplayWatch
from tensafe_server.fleet.restore import Onward, Restorer
from tensafe_server.fleet.verify import Verifications
from tensafe_server.ids import new_id
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import QUEUED, RUNNING, PendingOperation, RunState
from tensafe_server.operations.outcomes import Ending, Outcomes, as_error, withdrawn
from tensafe_server.operations.snapshots import RecoveryPolicy

log = logging.getLogger(__name__)

_UNWRITABLE = frozenset({"STORAGE_FULL", "STORAGE_UNAVAILABLE"})


class Reception:
    """What happens on a worker's stream.

    Attributes:
        on_begun: called with operations of which it is known now that a worker began them.
    """

    def __init__(
        self,
        ledger: Ledger,
        models: ModelRegistry,
        outcomes: Outcomes,
        dispatcher: Dispatcher,
        restorer: Restorer,
        replays: ReplayWatch,
        verifications: Verifications,
        recovery: RecoveryPolicy,
        liveness: Liveness,
        blame: Blame,
    ) -> None:
        self._ledger = ledger
        self._models = models
        self._outcomes = outcomes
        self._dispatcher = dispatcher
        self._restorer = restorer
        self._replays = replays
        self._verifications = verifications
        self._recovery = recovery
        self._liveness = liveness
        self._liveness.on_dead = self._take_for_dead
        self._liveness.on_hung = self._end_hung
        self._hung: set[str] = set()
        self._blame = blame
        self._blame.on_verdict = self._convict
        self._blame.on_acquitted = dispatcher.kick
        self.on_begun: Callable[[Sequence[PendingOperation]], None] = lambda operations: None
        self._uploads: dict[str, list[ArtifactFile]] = {}
        self._greetings: dict[str, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def arrive(self, register: pb.Register) -> WorkerLink:
        """Greets a worker and gives back the runs that it still holds rightly. If its stream breaks
        meanwhile, it arrives all the same, and leaves again with what it was given.

        Raises:
            TenSafeFault: MODEL_NOT_FOUND for a model that was not published; EXECUTOR_HUNG if it
                was told to end.
        """
        # What an earlier stream of it was given is to be taken back from that before.
        while (before := self._greetings.get(register.instance)) is not None:
            await asyncio.wait([before])
        arriving = asyncio.ensure_future(self._arrive(register))
        self._greet(register.instance, arriving)
        try:
            return await asyncio.shield(arriving)
        except asyncio.CancelledError:
            self._greet(register.instance, self._spawn(self._leave_again(arriving)))
            raise

    def _greet(self, instance: str, greeting: asyncio.Future[Any]) -> None:
        """Notes that a worker is being greeted until this is done."""
        self._greetings[instance] = greeting

        def end(_: asyncio.Future[Any]) -> None:
            if self._greetings.get(instance) is greeting:
                del self._greetings[instance]

        greeting.add_done_callback(end)

    async def _leave_again(self, arriving: asyncio.Future[WorkerLink]) -> None:
        with suppress(TenSafeFault):  # it was refused
            await self.leave(await arriving)

    async def _arrive(self, register: pb.Register) -> WorkerLink:
        if register.instance in self._hung:
            raise _hung(register.name, "it hung when it was last seen")
        for name in register.models:
            self._models.find(name)
        link = WorkerLink(new_id("wkr"), register)
        streams = [one for one in self._dispatcher.links if one.instance == link.instance]
        known = bool(streams) or self._blame.is_away(link.instance)
        for before in streams:
            await self._supersede(before)
        self._blame.returned(link.instance)
        if not known:
            self._blame.replaced(link.name)
        welcome = self._liveness.welcome(link)
        welcome.snapshots.CopyFrom(self._recovery.message())
        link.send(pb.ConnectResponse(welcome=welcome))
        self._dispatcher.greet(link)
        try:
            if register.held_runs:
                await self._restorer.flushed()  # what it told before it was cut off counts
            for held in register.held_runs:
                await self._take_back(link, held)
        except BaseException:
            self._dispatcher.dismiss(link)
            raise
        self._dispatcher.add(link)
        self._liveness.watch(link)
        log.info(
            "worker %s (%s) serves %s on %s, fingerprint %s: %s",
            *(link.id, link.name, sorted(link.models), link.device),
            *(link.digest, link.fingerprint),
        )
        return link

    async def leave(self, link: WorkerLink) -> None:
        """Takes back what a worker had; its runs go on elsewhere.

        An operation that was running when its worker was lost is tried once more; then it fails,
        so that it cannot take one worker after the other. A worker that is back was not lost
        (`arrive`), nor was one that has said goodbye.
        """
        link.close()
        if link.left:
            return
        link.left = True
        checking = self._verifications.lost(link)
        held = [p for p in map(self._ledger.pending, link.outstanding) if p is not None]
        held = [p for p in held if p.worker_id == link.id and not p.finishing]
        if link.departing:
            self._blame.returned(link.instance)
        else:
            gone = link.instance in self._hung
            self._blame.lost(link, held, checking=checking, gone=gone)
        self._dispatcher.remove(link)
        endings = self._blame.verdicts()
        for operation in held:
            operation.row.state = QUEUED
            if operation.withdrawn is not None and not operation.void:
                self._ledger.void(operation)
                endings.append(withdrawn(operation, operation.withdrawn))
        await self._outcomes.settle(endings)

    async def _supersede(self, link: WorkerLink) -> None:
        # The worker has noticed before us that this stream was cut.
        link.departing = True
        link.close(
            TenSafeFault(
                "STALE_ASSIGNMENT",
                f"worker {link.id} has come back over another stream",
                worker_id=link.id,
            )
        )
        await self.leave(link)

    def _convict(self, endings: Sequence[Ending]) -> None:
        self._spawn(self._settle(endings))

    async def _settle(self, endings: Sequence[Ending]) -> None:
        await self._outcomes.settle(endings)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _take_for_dead(self, link: WorkerLink, why: str) -> None:
        """Whatever the worker still sends under this link is passed over, and what it holds is
        stale as soon as another worker has it."""
        log.warning("worker %s (%s) is taken for dead: %s", link.id, link.name, why)
        fault = TenSafeFault(
            "STALE_ASSIGNMENT",
            f"worker {link.id} was taken for dead ({why}) and its runs were given away; "
            "connect anew",
            worker_id=link.id,
        )
        self._fence(link, fault)

    def _end_hung(self, link: WorkerLink, at: pb.Executing, why: str) -> None:
        """Takes a worker for dead whose executor hangs, for good: its process is told to end."""
        log.error("worker %s (%s) hangs and is told to end: %s", link.id, link.name, why)
        self._hung.add(link.instance)
        operation = self._ledger.pending(at.operation_id)
        if operation is not None and operation.worker_id == link.id:
            operation.row.state = RUNNING  # it is known now, if it was not reported before
            self.on_begun([operation])
        self._fence(link, _hung(link.name, why))

    def _fence(self, link: WorkerLink, fault: TenSafeFault) -> None:
        link.close(fault)
        self._spawn(self.leave(link))

    def heartbeat(self, link: WorkerLink, heartbeat: pb.WorkerHeartbeat) -> None:
        """Takes a heartbeat in."""
        self._liveness.beat(link, heartbeat)

    def goodbye(self, link: WorkerLink) -> None:
        """The worker finishes what it is at and leaves."""
        log.info("worker %s (%s) is leaving", link.id, link.name)
        link.draining = link.departing = True

    def upload_fence(self, artifact_id: str, epoch: int) -> Callable[[], None]:
        """Returns what checks that an artifact may be stored under this assignment, now.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT, also from the check itself.
        """
        operation = self._saving(artifact_id)

        def check() -> None:
            if operation is None or operation.finishing or not self._is_under(operation, epoch):
                log.warning("refused an upload of %s under assignment %d", artifact_id, epoch)
                raise TenSafeFault(
                    "STALE_ASSIGNMENT",
                    f"artifact {artifact_id} is not to be stored under assignment {epoch}: its run "
                    "has moved, or the operation has ended",
                    artifact_id=artifact_id,
                    epoch=epoch,
                )

        check()
        return check

    @staticmethod
    def _begin(link: WorkerLink, operation: PendingOperation) -> None:
        operation.row.state = RUNNING
        if not _is_to_stop(operation):
            operation.withdrawn = None  # that came too late: it is not to be lost by it
        operation.notify_started()
        link.groups.started(operation.row.id)

    async def report(self, link: WorkerLink, report: pb.Report) -> None:
        """Takes a report in. Outcomes under a stale assignment are passed over."""
        lost = await self._lost_saves(link, report.done)
        begun = []
        for started in report.started:
            operation = self._current(link, started.operation_id, started.epoch)
            if operation is not None:
                self._begin(link, operation)
                begun.append(operation)
        for drawn in report.chunks:
            operation = self._current(link, drawn.operation_id, drawn.epoch)
            if operation is not None and not operation.finishing:
                if operation.row.state != RUNNING:  # its first tokens may come before its start
                    self._begin(link, operation)
                    begun.append(operation)
                operation.take_tokens(drawn.chunk)
        self.on_begun(begun)
        endings: list[Ending] = []
        turns = _Turns(self._ledger)
        for done in report.done:
            if done.replay:
                if not self._verifications.take(link, done):
                    self._replays.take(link, done)
                continue
            operation = self._current(link, done.operation_id, done.epoch)
            if operation is not None:  # else it may have been sent anew, and is in a group again
                link.groups.ended(done.operation_id)
            if (
                operation is None
                or operation in lost
                or self._goes_elsewhere(link, operation, done)
                or not turns.take(operation, done.cancelled)
            ):
                log.info(
                    "passed over an outcome of %s under epoch %d", done.operation_id, done.epoch
                )
                continue
            endings.append(self._ending(link, operation, done))
        if report.done and link.group_cost:
            # Its next plan goes out while these outcomes are written.
            self._dispatcher.kick()
        for run in self._runs_at(link, [ending.operation for ending in endings]):
            self._blame.arrived(run)
            run.given_up.clear()
        for run in self._runs_at(link, begun):
            self._blame.arrived(run)
        if endings:
            told = await self._outcomes.settle(endings)
            told.add_done_callback(lambda _: _free(link, endings))
        self._save_anew(link, lost)
        for refused in report.refused:
            await self._refused(link, refused)
        # Behind the outcomes, so that they wait for one commit and not for two.
        self._blame.began(link, [one for one in begun if one.worker_id == link.id])
        self._blame.forget_arrivals()

    def _runs_at(self, link: WorkerLink, operations: Sequence[PendingOperation]) -> list[RunState]:
        """The runs of these operations that the worker holds, each once."""
        ids = dict.fromkeys(operation.row.run_id or "" for operation in operations)
        runs = [run for run_id in ids if (run := self._ledger.runs.get(run_id)) is not None]
        return [run for run in runs if run.worker_id == link.id]

    async def _lost_saves(
        self, link: WorkerLink, done: Sequence[pb.OperationDone]
    ) -> list[PendingOperation]:
        """Saves that a worker remembers from before a start of ours, and whose files are not here
        any more: a backup was put in the place of the disk. They are to be made anew."""
        lost = []
        for one in done:
            if not one.result.HasField("save_state"):
                continue
            operation = self._current(link, one.operation_id, one.epoch)
            if operation is None:
                continue
            artifact_id = operation.row.artifact_id or ""
            files = one.result.save_state.artifact.files
            if artifact_id in self._uploads or await self._restorer.has_artifact(
                artifact_id, files
            ):
                continue
            log.error("the files of %s are not there: it is saved anew", artifact_id)
            lost.append(operation)
        return lost

    def _save_anew(self, link: WorkerLink, lost: Sequence[PendingOperation]) -> None:
        """Brings their runs anew, behind what was told before them."""
        for operation in lost:
            run = self._ledger.runs[operation.row.run_id or ""]
            if run.worker_id == link.id:
                self._dispatcher.dispute(run)

    def _goes_elsewhere(
        self, link: WorkerLink, operation: PendingOperation, done: pb.OperationDone
    ) -> bool:
        """Whether an operation for which its worker's disk had no room is another worker's now. One
        with a place in a run stays: taking the run on there may need more room. So does one that is
        not to go on: it was cancelled, or its deadline has passed."""
        stays = operation.row.seq is not None or operation.finishing
        if stays or operation.withdrawn is not None or not done.HasField("error"):
            return False
        full = as_error(done.error).reason == "WORKER_DISK_FULL"
        return full and self._dispatcher.try_elsewhere(operation, link)

    def stored(self, artifact_id: str, files: Sequence[ArtifactFile]) -> None:
        """Notes an artifact's files until its operation is reported done."""
        self._uploads[artifact_id] = list(files)

    async def _refused(self, link: WorkerLink, refused: pb.RefusedSnapshot) -> None:
        """A worker did not bring a run to where the log has it. It gets a new epoch, so that
        nothing counts that was sent after this one, and an earlier snapshot if that was why."""
        if self._verifications.refused(link, refused):
            return
        run = self._ledger.runs.get(refused.run_id)
        if run is None or run.worker_id != link.id or run.epoch != refused.epoch:
            return
        self._blame.arrived(run)
        self._blame.forget_arrivals()
        if refused.snapshot_id:
            self._replays.refused(run, link, refused)
            self._dispatcher.give_back(run)
            self._dispatcher.kick()
            return
        detail = as_error(refused.error)
        log.error("%s did not come to where its log has it: %s", run.id, detail.message)
        at = self._ledger.pending(refused.operation_id)
        self._dispatcher.rest(run, TenSafeFault(detail.reason, detail.message), at)

    def _ending(
        self, link: WorkerLink, operation: PendingOperation, done: pb.OperationDone
    ) -> Ending:
        if done.cancelled:
            return withdrawn(operation, operation.withdrawn)
        ending = Ending(operation, executed=True, compute_ms=done.compute_ms)
        ending.snapshot_id, ending.charge_unused = done.snapshot_id, done.charge_unused
        # Nothing gives the same bits again without the company that it had.
        operation.row.fingerprint = None if done.company else link.digest
        if done.HasField("result"):
            ending.result = done.result
            ending.step_metrics = done.step_metrics
            ending.artifact_files = self._uploads.pop(
                operation.row.artifact_id or "",
                # Stored before a restart of ours; whoever stored them has kept the answer.
                done.result.save_state.artifact.files,
            )
        elif done.HasField("error"):
            ending.error = as_error(done.error)
        else:
            ending.error = TenSafeFault(
                "INTERNAL", f"worker {operation.worker_id} reported no outcome"
            ).detail
        return ending

    def _current(self, link: WorkerLink, operation_id: str, epoch: int) -> PendingOperation | None:
        operation = self._ledger.pending(operation_id)
        if operation is None or operation.worker_id != link.id:
            return None
        return operation if self._is_under(operation, epoch) else None

    def _is_under(self, operation: PendingOperation, epoch: int) -> bool:
        run = self._ledger.runs.get(operation.row.run_id or "")
        expected = run.epoch if run is not None and operation.row.seq is not None else 0
        return epoch == expected

    def _saving(self, artifact_id: str) -> PendingOperation | None:
        # Also one that was not sent yet: after a restart of ours its worker may still be at it.
        for run in self._ledger.runs.values():
            for operation in run.by_seq.values():
                row = operation.row
                if row.artifact_id == artifact_id and row.kind == ops.OPERATION_KIND_SAVE_STATE:
                    return operation
        return None

    async def _take_back(self, link: WorkerLink, held: pb.HeldRun) -> None:
        run = self._ledger.runs.get(held.run_id)
        onward: Onward | None = None
        if run is not None and self._holds_rightly(run, held):
            try:
                if await self._restorer.is_of_this_log(run, held):
                    onward = await self._restorer.catch_up(run, held)
            except Exception as error:
                if isinstance(error, TenSafeFault) and error.detail.reason in _UNWRITABLE:
                    raise  # nothing can be given back as long as nothing can be written
                # The others are not to wait for it: it is restored by itself.
                log.exception("%s cannot be given back to %s", run.id, link.id)
        # Looked at again: meanwhile it may have been deleted, or given to another worker.
        if run is None or onward is None or not self._holds_rightly(run, held):
            link.send(pb.ConnectResponse(release=pb.ReleaseRun(run_id=held.run_id)))
            return
        run.worker_id = link.id
        link.runs.add(run.id)
        self._dispatcher.bring(run, link, onward)

    def _holds_rightly(self, run: RunState, held: pb.HeldRun) -> bool:
        # It may be ahead of what was reported: operations that are sent again it answers from
        # memory. It is not to be ahead of the log, which a broken disk may have cut short; whether
        # what it was sent is what the log has by now, `is_of_this_log` tells.
        return (
            not run.deleted
            and run.worker_id is None
            and not run.in_flight
            and held.epoch == run.epoch
            and held.last_seq >= run.executed_seq
            and max(held.last_seq, held.planned_seq) < run.next_seq
        )


class _Turns:
    """Whose outcome is next in each run, while one report is read.

    A worker that was away goes on with what it had, and tells of an operation that we have just
    sent again before it answers the one before that from memory. Taken in as it comes, a crash
    between the two would leave a log whose replay lacks the first. It is answered once more in its
    turn. A SAMPLE changes nothing, so that nobody waits for its turn to end.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, deque[PendingOperation]] = {}

    def take(self, operation: PendingOperation, cancelled: bool) -> bool:
        """Whether the outcome may be taken in now; what was cancelled has no turn to wait for."""
        run = self._ledger.runs.get(operation.row.run_id or "")
        if run is None or operation.row.seq is None:
            return True
        if run.id not in self._waiting:
            self._waiting[run.id] = deque(op for op in run.in_flight if not op.finishing)
        waiting = self._waiting[run.id]
        first = next((one for one in waiting if not one.is_sample or one is operation), None)
        if first is operation or (cancelled and operation in waiting):
            waiting.remove(operation)
            return True
        return False


def _hung(name: str, why: str) -> TenSafeFault:
    return TenSafeFault(
        "EXECUTOR_HUNG",
        f"worker {name} hangs ({why}) and its watchdog has not ended it: its runs were given away, "
        "and the process is to end",
        worker=name,
    )


def _free(link: WorkerLink, endings: Sequence[Ending]) -> None:
    """Gives the worker its credits back. Not before the commit: it remembers outcomes for as many
    operations as it has credits, and after a crash it is asked for those that were not committed.
    """
    for ending in endings:
        link.free(ending.operation.row.id)


def _is_to_stop(operation: PendingOperation) -> bool:
    """Whether it is a sample that was cancelled, also if it runs."""
    why = operation.withdrawn
    return operation.is_sample and why is not None and why.reason == "OPERATION_CANCELLED"
