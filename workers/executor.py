"""One thread that executes planned operations in order and keeps their outcomes for the link.

A SAMPLE begins in its turn, on the weights that it finds, and goes on beside what follows. The
link (an event loop) submits plans, cancels and collects; the backend is called from the executor's
thread alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from tensafe import failpoints
from tensafe.v1 import training_pb2, worker_pb2
from workers import wire
from workers.agenda import Agenda, Farewell, Flush, Item, Release
from workers.artifacts import ArtifactCache, Transfers
from workers.backend import Backend
from workers.execution import Execution, SnapshotLoadError
from workers.failures import (
    FAILS_ALONE,
    OrderLeftError,
    RunLostError,
    as_fault,
    fail,
    given_up,
    passes_by,
)
from workers.grouping import (
    Member,
    PassCount,
    as_member,
    execute,
    passes,
    read_request,
    write_outcome,
)
from workers.keeping import HeldRun, SnapshotKeeper
from workers.operations import SampleChunk
from workers.private_steps import Ended, PrivateStep, PrivateSteps
from workers.progress import Claim, Known, Progress
from workers.samples import Samples
from workers.telling import Telling
from workers.turns import Turns
from workers.watchdog import Activity, OperationLimits

log = logging.getLogger(__name__)

_REPLAY_SKIPS = frozenset({"sample", "forward", "save_state"})
_FAREWELL_S = 20.0
_MOST_REFERENCES = 4


class Executor:
    """Executes plans on one backend.

    Args:
        backend: what does the work.
        transfers: where artifacts come from and go to; called from the executor's thread.
        on_progress: called from the executor's thread whenever `collect` would have news, or
            `idle` has become true.
        limits: how long an operation may run, for whoever watches `activity`.
        on_broken: called from the executor's thread, which then ends, when something failed that
            belongs to no operation: what is planned will never be executed.

    Attributes:
        activity: what the thread is at.
        snapshots: what makes them, and when.
    """

    def __init__(
        self,
        backend: Backend,
        transfers: Transfers,
        on_progress: Callable[[], None],
        limits: OperationLimits | None = None,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        self._on_broken = on_broken
        self.activity = Activity()
        self._limits = limits or OperationLimits()
        self._leaving = False
        self._farewell_due = False
        self._backend = backend
        self._transfers = transfers
        self._artifacts = ArtifactCache(transfers)
        self._execution = Execution(backend, transfers, self._artifacts, self._extend)
        self._on_progress = on_progress
        self._inbox: queue.SimpleQueue[
            tuple[int, worker_pb2.Plan | Release | Flush | Farewell] | PrivateStep | None
        ] = queue.SimpleQueue()
        self._agenda = Agenda()
        self._pass_count = PassCount()
        self._stream = 0
        self._closing = False
        self._submitted = 0
        self._finished = 0
        self._progress = Progress(2 * backend.credits, backend.instant, on_progress)
        self._samples = Samples(
            backend.sampler, self._execution, self._progress, self.activity, self._limits
        )
        self._turns = Turns()
        self._refused: deque[worker_pb2.RefusedSnapshot] = deque()
        self._runs: dict[str, HeldRun] = {}
        self._coming: dict[str, worker_pb2.RunAssignment] = {}
        self.snapshots = SnapshotKeeper(backend, self._runs, transfers)
        self._private = PrivateSteps(transfers, self._inbox.put)
        self._telling = Telling(backend, self._progress, self._private, self._give_up)
        self._thread = self._new_thread()

    # Called by the link.

    def start(self) -> None:
        """Starts the threads."""
        self.snapshots.start()
        self._private.start()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the operations at hand, and waits for it. What is still queued is
        dropped: wait for `idle` first where that matters."""
        self._closing = True
        self._inbox.put(None)
        while (thread := self._thread).is_alive():
            thread.join()  # which another may have followed by then
        self._pass_count.tell()
        self.snapshots.close()
        self._private.close()
        self._artifacts.close()

    @property
    def idle(self) -> bool:
        """Whether everything that was submitted has been executed, and can be told."""
        done = self._submitted == self._finished and self._private.idle
        return done and not (self._samples.busy or self._farewell_due)

    def held_runs(self) -> list[worker_pb2.HeldRun]:
        """The runs held or about to be, how far each is, and what else was sent of it."""
        # Asked first: what ends meanwhile is in `last_seq`.
        known = self._progress.known()
        # Left out, nobody would take back what has gone elsewhere before it is taken on.
        told = {
            coming.run_id: (coming.epoch, coming.seq)
            for coming in list(self._coming.values())
            if not coming.check
        }
        for run_id, run in list(self._runs.items()):
            if run.is_held:
                told.setdefault(run_id, (run.epoch, run.last_seq))
        held = []
        for run_id, (epoch, last_seq) in told.items():
            of_run = known.get((run_id, epoch), Known())
            held.append(
                worker_pb2.HeldRun(
                    run_id=run_id,
                    epoch=epoch,
                    last_seq=last_seq,
                    planned_seq=max(last_seq, of_run.last_seq),
                    operation_ids=sorted(of_run.operation_ids),
                )
            )
        return held

    def new_stream(self) -> None:
        """From here on plans come over a new stream, which numbers its groups anew."""
        self._stream += 1
        self._progress.new_stream()

    def submit(self, plan: worker_pb2.Plan) -> None:
        """Queues a plan."""
        self._progress.expect(plan.operations)
        self._coming |= {assignment.run_id: assignment for assignment in plan.runs}
        self._submitted += len(plan.runs) + len(plan.operations)
        self._inbox.put((self._stream, plan))
        self._progress.repeat(plan.operations)

    def cancel(self, operation_id: str, *, waiting_only: bool = False) -> None:
        """Takes back an operation that has not started and, unless `waiting_only`, stops a SAMPLE
        that runs before its next token; anything else that runs goes to its end."""
        self._progress.cancel(operation_id, waiting_only=waiting_only)

    def release(self, run_id: str) -> None:
        """Forgets a run. What is still planned of it has been taken back before."""
        self._put(Release(run_id))

    def _put(self, item: Release | Flush | Farewell) -> None:
        self._submitted += 1
        self._inbox.put((self._stream, item))

    def flush_snapshots(self, timeout_s: float) -> bool:
        """Makes a snapshot of every run that has moved since its last one, after the operations at
        hand, and waits until they are stored; False if that took longer. Blocks."""
        flush = Flush(threading.Event())
        deadline = time.monotonic() + timeout_s
        self._put(flush)
        if not flush.captured.wait(timeout_s):
            return False
        return self.snapshots.wait_stored(max(0.0, deadline - time.monotonic()))

    def collect_refused(self) -> list[worker_pb2.RefusedSnapshot]:
        """Takes the runs that were given up since the last call. Call it before `collect` and send
        what it gives after that: what was told of a run comes before its end."""
        refused = []
        while self._refused:
            refused.append(self._refused.popleft())
        return refused

    def leave(self) -> None:
        """Begins nothing more: `idle` becomes true when the operation at hand has ended and the
        runs' snapshots are stored. What has not begun is the coordinator's to give away."""
        self._leaving = True
        self._put(Farewell())

    def collect(self) -> tuple[list[worker_pb2.OperationStarted], list[worker_pb2.OperationDone]]:
        """Takes what happened since the last call: operations that began and still run, and
        operations that ended."""
        return self._progress.collect()

    def collect_chunks(self) -> list[tuple[int, SampleChunk]]:
        """Takes the streamed pieces since the last call, each with its operation's epoch. Call it
        after `collect` and send what it gives first: an outcome comes behind its pieces."""
        return self._progress.collect_chunks()

    # On the executor's thread.

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            if self._on_broken is None:
                raise
            log.critical("the executor has failed, and executes nothing more", exc_info=True)
            self._on_broken()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="tensafe-executor", daemon=True)

    def _work(self) -> None:
        while self._fill():
            if self._backend.thread_is_spoiled:
                log.warning("a new thread executes what comes: this one has lacked memory")
                following = self._new_thread()
                following.start()
                self._thread = following
                return
            begin = time.perf_counter()
            trains = bool(self._agenda)
            if self._turns.training_is_next(trains=trains, samples=self._samples.busy):
                items = self._agenda.take()
                self._group(items)
                self._finished += len(items)
                self._turns.trained(time.perf_counter() - begin)
                self._on_progress()
            else:
                ended = self._samples.step()
                self._turns.sampled(time.perf_counter() - begin)
                if ended:
                    self._on_progress()
            if self._farewell_due and not self._samples.busy:
                self._say_farewell()

    def _fill(self) -> bool:
        """Takes in all that has come; waits for it if there is nothing to do. False: the end."""
        while True:
            try:
                item = self._inbox.get(block=not (self._agenda or self._samples.busy))
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, PrivateStep):
                self._telling.stored(item)
                self._on_progress()
            else:
                self._agenda.put(*item)

    def _group(self, items: Sequence[Item]) -> None:
        """Executes a group, or what a plan has without a group."""
        members: list[Member] = []
        at_hand = self._artifacts.at_hand(_MOST_REFERENCES)
        for item in items:
            if isinstance(item, Farewell):
                self._prepare_farewell()
            elif self._closing or self._leaving:
                continue
            elif isinstance(item, Release):
                self._samples.drop_run(item.run_id)
                self._backend.close_run(item.run_id)
                self._runs.pop(item.run_id, None)
                self.snapshots.forget(item.run_id)
                self._telling.forget(item.run_id)
            elif isinstance(item, Flush):
                self.snapshots.flush()
                item.captured.set()
            elif isinstance(item, worker_pb2.RunAssignment):
                self._take_on(item)
                if self._coming.get(item.run_id) is item:
                    del self._coming[item.run_id]
            elif (member := as_member(item, at_hand)) is not None:
                members.append(member)
            else:
                self._operation(item)
        for together in passes(members, self._runs):
            if self._closing or self._leaving:
                return
            if len(together) == 1:
                self._operation(together[0].planned)
            else:
                self._together(together)

    def _take_on(self, assignment: worker_pb2.RunAssignment) -> None:
        held = self._runs.get(assignment.run_id)
        if held is not None and held.epoch == assignment.epoch and held.fault is None:
            return
        self._samples.drop_run(assignment.run_id)
        self._telling.forget(assignment.run_id)
        run = HeldRun(
            assignment.epoch,
            assignment.config.model_ref,
            last_seq=assignment.seq,
            check=assignment.check,
            deterministic=assignment.config.deterministic,
            private=assignment.config.dp.enabled,
        )
        self._runs[assignment.run_id] = run
        if run.private:
            self._progress.keep_apart(assignment.run_id)
        self.activity.begin("", assignment.run_id, self._limits.base_s)
        try:
            settings = wire.run_settings(assignment.config)
            if assignment.snapshot_id:
                self._execution.open_from_snapshot(assignment, settings)
                return
            state = None
            if assignment.artifact_id:
                state = self._artifacts.directory(assignment.artifact_id)
            self._backend.open_run(assignment.run_id, settings, state)
        except SnapshotLoadError as error:
            self._give_up(error.refused)
        except Exception as error:
            fault = as_fault(error, f"taking on run {assignment.run_id}")
            if passes_by(fault):
                self._give_up(given_up(assignment.run_id, assignment.epoch, fault))
                return
            # The run's operations fail with this; the worker and its other runs go on.
            self._backend.close_run(assignment.run_id)
            run.fault = fault
        finally:
            self.activity.end()

    def _give_up(self, refused: worker_pb2.RefusedSnapshot) -> None:
        """Leaves a run to its next assignment, and with it the samples that draw from it."""
        self._samples.drop_run(refused.run_id)
        self._backend.close_run(refused.run_id)
        self._runs[refused.run_id].refused = True
        self._refused.append(refused)
        self._on_progress()

    def _lose(self, ended: Ended, lost: RunLostError) -> None:
        """Leaves a run to its next assignment, and with it the operation that it was at, unless
        that was begun and nothing of it is in a replay once it has failed: it might fail for
        ever."""
        spec, planned = ended.spec, ended.planned
        begun = "" if isinstance(lost, OrderLeftError) else planned.operation_id
        if begun and spec.WhichOneof("operation") in FAILS_ALONE:
            fail(ended.done, lost.fault, planned)
            self._telling.end([ended])
            begun = ""
        else:
            self._progress.abandon(planned)
        # Behind the outcome, which would be stale after it.
        self._give_up(given_up(spec.run_id, planned.epoch, lost.fault, begun))

    def _extend(self, tokens: int) -> None:
        """The operation at hand turns out to have so many tokens."""
        step = self.activity.step
        if step is not None:
            self.activity.begin(step.operation_id, step.run_id, self._limits.of_tokens(tokens))

    def _claim(
        self,
        spec: training_pb2.OperationSpec,
        planned: worker_pb2.PlannedOperation,
        kind: str = "",
    ) -> bool:
        claim = self._progress.claim(planned, spec.run_id, stoppable=kind == "sample")
        if claim is Claim.CANCELLED:
            self._void(planned)
        return claim is Claim.MINE

    def _operation(self, planned: worker_pb2.PlannedOperation) -> None:
        if planned.void:
            self._void(planned)
            return
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        kind = spec.WhichOneof("operation") or ""
        if planned.replay:
            self._replay(spec, kind, planned)
            return
        if not self._claim(spec, planned, kind):
            return
        self._progress.begin()
        done = _done(planned)
        begin = time.perf_counter()
        try:
            if self._execute(spec, kind, planned, done):
                return
        except _RefusedRunError:
            self._progress.abandon(planned)
            return
        except RunLostError as lost:
            self._lose(Ended(spec, planned, done), lost)
            return
        except Exception as error:
            fail(done, error, planned)
        done.compute_ms = (time.perf_counter() - begin) * 1e3
        self._telling.end([Ended(spec, planned, done)])
        self.snapshots.after(spec, planned, done)

    def _replay(
        self, spec: training_pb2.OperationSpec, kind: str, planned: worker_pb2.PlannedOperation
    ) -> None:
        """Executes an operation for its effect; what it gives is compared with the log."""
        done = _done(planned)
        done.replay = True
        done.run_id = planned.run_id or spec.run_id
        begin = time.perf_counter()
        try:
            self._execute(spec, kind, planned, done)
        except _RefusedRunError:
            return
        except RunLostError as lost:
            self._give_up(given_up(done.run_id, planned.epoch, lost.fault))
            return
        except Exception as error:
            if not (planned.failed or self._runs[done.run_id].check):
                # What comes after it would be computed from another state than the logged one.
                fault = as_fault(error, f"replaying operation {planned.operation_id}")
                self._give_up(given_up(done.run_id, planned.epoch, fault))
                return
            fail(done, error, planned)
        done.compute_ms = (time.perf_counter() - begin) * 1e3
        if done.WhichOneof("outcome"):  # some kinds change nothing and are passed over
            self._progress.tell(done)
        self.snapshots.after(spec, planned, done)

    def _together(self, members: Sequence[Member]) -> None:
        """Executes operations of different runs as one pass; each has its own outcome."""
        claimed = [member for member in members if self._claim(member.spec, member.planned)]
        if not claimed:
            return
        self._progress.begin()
        limit_s = sum(self._limits.of(member.spec) for member in claimed)
        self.activity.begin(claimed[0].planned.operation_id, claimed[0].spec.run_id, limit_s)
        ready: list[Member] = []
        for member in claimed:
            try:
                self._held(member.spec, member.planned).last_seq = member.spec.seq
                member.is_held = True
                read_request(member, self._artifacts.directory)
                ready.append(member)
            except Exception as error:
                member.outcome = error
        if ready:
            execute(self._backend, ready)
            failpoints.hit("mid-step")
            if len(ready) > 1:
                failpoints.hit("mid-group")
            self._pass_count.add(len(ready))
        ended: list[Ended] = []
        for member in claimed:
            done = _done(member.planned)
            done.compute_ms = member.compute_ms
            if member in ready and member.kind == "forward_backward":
                done.company = len(ready) - 1
            try:
                write_outcome(self._backend, member, done)
            except _RefusedRunError:
                self._progress.abandon(member.planned)
                continue
            except RunLostError as lost:
                self._lose(Ended(member.spec, member.planned, done), lost)
                continue
            except Exception as error:
                fail(done, error, member.planned)
            ended.append(Ended(member.spec, member.planned, done))
        self.activity.end()
        self._telling.end(ended)
        for item in ended:
            self.snapshots.after(item.spec, item.planned, item.done)

    def _void(self, planned: worker_pb2.PlannedOperation) -> None:
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        run_id = planned.run_id or spec.run_id
        run = self._runs.get(run_id)
        if run is None or run.epoch != planned.epoch or run.fault is not None or run.refused:
            return
        if spec.seq <= run.last_seq:
            return  # it has heard of it: it was told again over a new stream
        try:
            if spec.HasField("forward_backward"):
                self._backend.poison(run_id)
            elif planned.void:
                self._backend.drop_window(run_id)
        except Exception as error:
            fault = as_fault(error, f"marking the window of {run_id}")
            self._give_up(given_up(run_id, planned.epoch, fault))
            return
        run.last_seq = spec.seq

    def _execute(
        self,
        spec: training_pb2.OperationSpec,
        kind: str,
        planned: worker_pb2.PlannedOperation,
        done: worker_pb2.OperationDone,
    ) -> bool:
        """Fills in what came of an operation. True: it goes on beside others."""
        self.activity.begin(planned.operation_id, spec.run_id, self._limits.of(spec))
        run = self._held(spec, planned) if spec.HasField("seq") else None
        try:
            if planned.replay and kind in _REPLAY_SKIPS:
                return False
            if kind == "sample":
                self._private.wait_stored(spec.run_id)
                self._samples.begin(spec, planned)
                return True
            run_id = planned.run_id or spec.run_id
            self._execution.numbered(kind, run_id, spec, planned, done)
            return False
        finally:
            if run is not None:
                run.last_seq = spec.seq
            self.activity.end()

    def _held(
        self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation
    ) -> HeldRun:
        """The operation's run, if the operation may be executed now."""
        run_id = planned.run_id or spec.run_id
        run = self._runs.get(run_id)
        if run is None or run.epoch != planned.epoch:
            raise RuntimeError(f"run {run_id} is not held under epoch {planned.epoch}")
        if run.refused:
            raise _RefusedRunError
        if run.fault is not None:
            raise run.fault
        if spec.seq <= run.last_seq:
            # What the run has done is not what the log has.
            error = RuntimeError(f"seq {spec.seq} of {run_id} comes after {run.last_seq}")
            raise OrderLeftError(run_id, error)
        if planned.HasField("charge") and self._private.open_step(run_id) is not None:
            raise RuntimeError(f"a private step of {run_id} came before the last one was told")
        return run

    def _prepare_farewell(self) -> None:
        """Nothing changes the runs any more, so their snapshots go out while samples end."""
        self.snapshots.flush()
        self._farewell_due = True

    def _say_farewell(self) -> None:
        if not self.snapshots.wait_stored(_FAREWELL_S):
            log.warning("not all snapshots were stored before leaving; more is to be replayed")
        self._farewell_due = False
        self._on_progress()


class _RefusedRunError(Exception):
    """The operation belongs to a run whose snapshot was refused."""


def _done(planned: worker_pb2.PlannedOperation) -> worker_pb2.OperationDone:
    return worker_pb2.OperationDone(operation_id=planned.operation_id, epoch=planned.epoch)
