"""Whatever is submitted, cancelled, cut and killed, in whatever order: every operation ends once,
and as if a run's operations had been executed one after another, each sample on the weights of its
place."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from fault.order_world import World, forward_backward, sample
from google.rpc.status_pb2 import Status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import from_status
from tensafe_server.fleet import dispatcher

SUCCEEDED, FAILED = ops.OPERATION_STATE_SUCCEEDED, ops.OPERATION_STATE_FAILED
CANCELLED = ops.OPERATION_STATE_CANCELLED
RUNS = 2
WORKERS = 2
MOCK_REASONS = ("WINDOW_POISONED", "EMPTY_WINDOW", "OUT_OF_MEMORY")

OPERATIONS: dict[str, dict[str, Any]] = {
    "gradient": {"forward_backward": forward_backward()},
    "large": {"forward_backward": forward_backward(range(1, 100))},
    "update": {"optim_step": training.OptimStep()},
    "sample": {"sample": sample(3)},
    "refused": {"forward_backward": forward_backward([])},
    "save": {"save_state": training.SaveState()},
    "save_weights": {"save_state": training.SaveState(include_optimizer=False)},
}
OTHER = {"forward": training.Forward(batch=forward_backward().batch)}


class Follower:
    """A run, as its log says that its operations went, one after another."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.step = 0
        self.gradients = 0
        self.poisoned = False
        self.saved: dict[str, tuple[int, int, bool]] = {}

    def follow(self, run_id: str) -> None:
        for number, row in enumerate(self.world.rows(run_id), 1):
            assert row.seq == number
            getattr(self, ops.OperationKind.Name(row.kind).lower().removeprefix("operation_kind_"))(
                row
            )

    def forward_backward(self, row) -> None:
        if row.state == SUCCEEDED:
            self.gradients += 1
        else:
            self.poisoned = True

    def unspecified(self, row) -> None:
        """It never came."""
        assert reason_of(row) == "SEQ_GAP"
        self.poisoned = True

    def optim_step(self, row) -> None:
        if row.state == SUCCEEDED:
            assert self.gradients
            assert not self.poisoned, f"half a gradient at seq {row.seq}"
            self.step += 1
            assert self.world.result(row).optim_step.step == self.step
        elif not row.executed:
            return
        elif (reason := reason_of(row)) == "OUT_OF_MEMORY":
            assert self.gradients
            assert not self.poisoned
        else:
            assert reason == ("WINDOW_POISONED" if self.poisoned else "EMPTY_WINDOW"), reason
            assert self.poisoned or not self.gradients
        self.gradients, self.poisoned = 0, False

    def save_state(self, row) -> None:
        if row.state == SUCCEEDED:
            artifact = self.world.result(row).save_state.artifact
            assert artifact.step == self.step
            self.saved[artifact.id] = self.step, self.gradients, self.poisoned

    def load_state(self, row) -> None:
        if row.state == SUCCEEDED:
            result = self.world.result(row).load_state
            step, gradients, poisoned = self.saved[result.artifact_id]
            if result.optimizer_restored:
                self.step, self.gradients, self.poisoned = step, gradients, poisoned
            else:
                self.gradients, self.poisoned = 0, False
            assert result.step == self.step

    def sample(self, row) -> None:
        if row.state == SUCCEEDED:
            result = self.world.result(row).sample
            assert result.model_step == self.step, f"other weights at seq {row.seq}"
            whole = f" [Mock completion for step {self.step}]"
            assert whole.startswith(result.completions[0].completion)


def reason_of(row) -> str:
    return from_status(Status.FromString(row.error)).reason


class Machine(RuleBasedStateMachine):
    """Two runs on two workers.

    Attributes:
        accepted: every operation that was answered with its id.
        refused: of these, those that were refused as such.
        deleted: runs that are deleted before everything has ended.
        cancelled, expired: what was cancelled while it was open, and whose deadline passed while
            it was not known to have begun.
    """

    operations = Bundle("operations")
    run_numbers = st.integers(0, RUNS - 1)
    worker_numbers = st.integers(0, WORKERS - 1)

    def __init__(self) -> None:
        super().__init__()
        self._retry_s, dispatcher._RETRY_S = dispatcher._RETRY_S, 0.0
        self.world = World(RUNS, WORKERS)
        self.runs = list(self.world.next_seq)
        self.accepted: set[str] = set()
        self.refused: set[str] = set()
        self.cancelled: set[str] = set()
        self.expired: set[str] = set()
        self.deleted: set[str] = set()

    def _send(self, specs) -> list[str]:
        outcomes = self.world.do(self.world.send(specs))
        for outcome in outcomes:
            assert outcome.operation_id, outcome
            self.accepted.add(outcome.operation_id)
            if outcome.error is not None:
                self.refused.add(outcome.operation_id)
        return [outcome.operation_id for outcome in outcomes]

    def _submit(self, run: int, what: str, *, deadline: bool = False) -> str:
        spec = self.world.next(self.runs[run], deadline=deadline, **OPERATIONS[what])
        [operation_id] = self._send([spec])
        assert (operation_id in self.refused) == (what == "refused")
        return operation_id

    def _flow(self, times: int) -> None:
        """Training goes on and is told of; nothing is drawn, so that samples stay behind."""
        for at, host in enumerate(self.world.hosts):
            self.world.do(self.world.connect(at))
            for _ in range(times):
                moved = self.world.do(self.world.deliver(at))
                moved |= host.worker.execute()
                moved |= self.world.do(self.world.report(at))
                if not moved:
                    break

    # A client.

    @rule(
        run=run_numbers,
        what=st.sampled_from(["gradient", "large", "update", "sample", "refused", "save"]),
        deadline=st.booleans(),
        target=operations,
    )
    def submit(self, run: int, what: str, deadline: bool) -> str:
        return self._submit(run, what, deadline=deadline)

    @rule(run=run_numbers, steps=st.integers(1, 3), flow=st.sampled_from([0, 2, 8]))
    def train(self, run: int, steps: int, flow: int) -> None:
        for _ in range(steps):
            self._submit(run, "gradient")
            self._submit(run, "update")
        self._flow(flow)

    @rule(each=st.lists(st.tuples(run_numbers, st.sampled_from(list(OPERATIONS))), min_size=2))
    def submit_batch(self, each: list[tuple[int, str]]) -> None:
        specs = [self.world.next(self.runs[run], **OPERATIONS[what]) for run, what in each]
        ids = self._send(specs)
        assert [self.world.specs[one].seq for one in ids] == [spec.seq for spec in specs]
        assert self._send(specs[1:]) == ids[1:], "the same operations again"

    @rule(operation=operations)
    def repeat(self, operation: str) -> None:
        """It gets the same operation back, however it stands, and whoever sends another one under
        its seq is told so."""
        spec = self.world.specs.get(operation)
        if spec is None:
            return  # it is lost
        [outcome] = self.world.do(self.world.send([spec]))
        assert outcome.operation_id == operation
        assert outcome.repeated
        if spec.HasField("seq"):
            other = training.OperationSpec(run_id=spec.run_id, seq=spec.seq, **OTHER)
            [outcome] = self.world.do(self.world.send([other]))
            assert from_status(outcome.error).reason == "SEQ_CONFLICT"

    @rule(run=run_numbers, what=st.sampled_from(["gradient", "update"]))
    def submit_unheard(self, run: int, what: str) -> None:
        spec = self.world.next(self.runs[run], **OPERATIONS[what])
        outcome = self.world.do(self.world.send_and_hang_up(spec))
        assert outcome.error is None, outcome
        self.accepted.add(outcome.operation_id)

    @rule(run=run_numbers, what=st.sampled_from(["gradient", "update", "sample"]))
    def submit_early(self, run: int, what: str) -> None:
        self.world.skip(self.runs[run])
        self._submit(run, what)

    @rule(run=run_numbers, what=st.sampled_from(["gradient", "update", "refused"]))
    def fill_gap(self, run: int, what: str) -> None:
        run_id = self.runs[run]
        if self.world.skipped[run_id]:
            seq = self.world.skipped[run_id].pop(0)
            self._send([training.OperationSpec(run_id=run_id, seq=seq, **OPERATIONS[what])])

    @rule(run=run_numbers)
    def lose_patience(self, run: int) -> None:
        self.world.do(self.world.close_gap(self.runs[run]))

    @rule(run=run_numbers, steps=st.integers(1, 2), at=worker_numbers)
    def sample_and_train_on(self, run: int, steps: int, at: int) -> None:
        self.train(run, 1, 0)
        self._submit(run, "sample")
        self.train(run, steps, 8)
        self.snapshot(run, at)

    @rule(run=run_numbers, what=st.sampled_from(["save", "save_weights"]), weights=st.booleans())
    def save_and_go_back(self, run: int, what: str, weights: bool) -> None:
        self._submit(run, what)
        self._flow(8)
        self.train(run, 1, 0)
        self.go_back(run, weights)

    @rule(run=run_numbers, weights=st.booleans())
    def go_back(self, run: int, weights: bool) -> None:
        """To what was saved last."""
        artifact_id = self.world.do(self.world.newest_artifact(self.runs[run]))
        if artifact_id is not None:
            load = training.LoadState(artifact_id=artifact_id)
            if weights:
                load.include_optimizer = False
            self._send([self.world.next(self.runs[run], load_state=load)])

    @rule(run=run_numbers)
    def delete_artifact(self, run: int) -> None:
        artifact_id = self.world.do(self.world.newest_artifact(self.runs[run]))
        if artifact_id is not None:
            self.world.do(self.world.delete_artifact(artifact_id))

    @rule(tokens=st.integers(1, 5), target=operations)
    def lane(self, tokens: int) -> str:
        operation_id = self.world.do(self.world.submit_lane(tokens))
        self.accepted.add(operation_id)
        return operation_id

    @rule(operation=operations)
    def cancel(self, operation: str) -> None:
        if self.world.do(self.world.cancel(operation)):
            self.cancelled.add(operation)

    @rule(run=run_numbers, after=st.integers(0, 3))
    def cancel_all(self, run: int, after: int) -> None:
        """Of a run, but the first few; the last one first."""
        ids = [one for one, spec in self.world.specs.items() if spec.run_id == self.runs[run]]
        for operation in reversed(ids[after:]):
            self.cancel(operation)

    @rule(operation=operations)
    def pass_deadline(self, operation: str) -> None:
        had_begun = self.world.is_running(operation)
        if self.world.do(self.world.pass_deadline(operation)) and not had_begun:
            self.expired.add(operation)

    @rule(run=run_numbers, restarts=st.booleans())
    def pass_deadline_of_what_a_lost_worker_was_at(self, run: int, restarts: bool) -> None:
        operation = self._submit(run, "sample", deadline=True)
        self._flow(8)
        has_begun = self.world.is_running(operation)
        for at in range(WORKERS):
            self.world.do(self.world.cut(at))
        was_ended = self.world.do(self.world.pass_deadline(operation))
        assert not (has_begun and was_ended)
        if was_ended:
            self.expired.add(operation)
        if restarts:
            self.world.do(self.world.restart())

    @rule(run=run_numbers, really=st.sampled_from([False, False, False, True]))
    def delete_in_the_end(self, run: int, really: bool) -> None:
        """With whatever of the run is open then."""
        if really:
            self.deleted.add(self.runs[run])

    # Workers, and what lies between.

    @rule(times=st.integers(1, 6))
    def flow(self, times: int) -> None:
        self._flow(times)

    @rule(
        deliver=st.booleans(),
        executed=st.integers(0, 4),
        drawn=st.integers(0, 3),
        at=worker_numbers,
    )
    def work(self, deliver: bool, executed: int, drawn: int, at: int) -> None:
        """Nobody hears of it yet."""
        if deliver:
            self.world.do(self.world.deliver(at))
        for _ in range(executed):
            self.world.hosts[at].worker.execute()
        for _ in range(drawn):
            self.world.hosts[at].worker.draw()

    @rule(at=worker_numbers)
    def report(self, at: int) -> None:
        self.world.do(self.world.report(at))

    @rule(run=run_numbers, at=worker_numbers)
    def snapshot(self, run: int, at: int) -> None:
        self.world.do(self.world.snapshot(self.runs[run], at))
        self.world.do(self.world.prune(self.runs[run]))

    @rule(
        how=st.sampled_from(["lose_a_report", "cut", "kill_worker", "kill_worker", "drain_worker"]),
        at=worker_numbers,
    )
    def break_a_worker(self, how: str, at: int) -> None:
        self.world.do(getattr(self.world, how)(at))

    @rule(at=worker_numbers, told=st.booleans(), with_it=st.booleans())
    def die_at_it(self, at: int, told: bool, with_it: bool) -> None:
        """A worker dies at what it has just begun; `with_it`: the coordinator before it sees it."""
        self.world.do(self.world.deliver(at))
        self.world.hosts[at].worker.begin()
        if told:
            self.world.do(self.world.report(at))
        if with_it:
            self.world.do(self.world.restart())
        self.world.do(self.world.kill_worker(at))

    @rule(
        at=worker_numbers,
        what=st.sampled_from(["open_run", "forward_backward", "optim_step", "untold"]),
    )
    def lack_memory(self, at: int, what: str) -> None:
        """The worker's next call of this kind fails, be it in a replay or not."""
        self.world.hosts[at].worker.backend.scarce[what] = 1

    @rule(at=worker_numbers, executed=st.integers(0, 3), away=st.booleans())
    def take_for_dead(self, at: int, executed: int, away: bool) -> None:
        """It goes on with what it has, and tells of it over the stream that is fenced off."""
        self.world.do(self.world.fence(at))
        if away:  # its runs are with the other one by now
            self.world.do(self.world.connect(1 - at))
            self.world.do(self.world.deliver(1 - at))
        for _ in range(executed):
            self.world.hosts[at].worker.execute()
        before = Counter(self.world.store.outcomes)
        self.world.do(self.world.report(at))
        assert self.world.store.outcomes == before, "taken in from whoever is fenced off"

    @rule(how=st.sampled_from(["restart", "restart", "drain"]), run=run_numbers)
    def end_the_coordinator(self, how: str, run: int) -> None:
        if how == "restart":
            self.world.do(self.world.restart())
            return
        spec = training.OperationSpec(
            run_id=self.runs[run], seq=self.world.next_seq[self.runs[run]], **OPERATIONS["update"]
        )
        self.world.do(self.world.drain(spec))

    @rule()
    def back_up(self) -> None:
        self.world.do(self.world.back_up())

    @rule()
    def put_back(self) -> None:
        """What was accepted since the backup is lost, and its seqs are used again."""
        if self.world.do(self.world.put_back()):
            self.accepted.intersection_update(self.world.specs)

    @rule(
        run=run_numbers,
        lost=st.lists(st.sampled_from(["gradient", "update", "sample"]), min_size=1, max_size=3),
        again=st.lists(st.sampled_from(["gradient", "update"]), max_size=3),
        told=st.booleans(),
        cancelled=st.booleans(),
    )
    def lose_what_a_worker_was_at(
        self, run: int, lost: list[str], again: list[str], told: bool, cancelled: bool
    ) -> None:
        self.train(run, 1, 8)
        self.back_up()
        for what in lost:
            self._submit(run, what)
        for at in range(WORKERS):
            self.work(True, 4, 0, at)
            if told:
                self.report(at)
        self.put_back()
        ids = [self._submit(run, what) for what in again]
        if cancelled and ids:
            self.cancel(ids[0])

    @invariant()
    def what_is_open_is_known(self) -> None:
        for run in self.world.coordinator.ledger.runs.values():
            seqs = [operation.seqs for operation in run.queue]
            assert all(last < first for (_, last), (first, _) in pairwise(seqs))

    def teardown(self) -> None:
        try:
            self._delete(self.deleted)
            self.world.finish()
            ended = [row for run_id in self.runs for row in self.world.rows(run_id)]
            ended += self.world.rows(None)
            missing = {row.id for row in ended if row.kind == ops.OPERATION_KIND_UNSPECIFIED}
            assert {row.id for row in ended} - missing == self.accepted
            assert max(self.world.store.outcomes.values(), default=1) == 1, "two outcomes"
            told = [operation.id for operation in self.world.told()]
            assert sorted(told) == sorted(row.id for row in ended), "each is told of once"
            for row in ended:
                self._ended_rightly(row)
            for run_id in self.runs:
                Follower(self.world).follow(run_id)
            assert self.world.coordinator.replays.mismatches == 0
            self._delete(set(self.runs) - self.deleted)
            self.world.finish()
            for host in self.world.hosts:
                assert not host.worker.backend._runs, "memory of runs that nobody has any more"
        finally:
            dispatcher._RETRY_S = self._retry_s
            self.world.close()

    def _delete(self, run_ids: set[str]) -> None:
        for run_id in sorted(run_ids):
            opened = self.world.coordinator.ledger.runs[run_id].by_seq.values()
            self.cancelled |= {operation.row.id for operation in opened}
            self.world.do(self.world.delete_run(run_id))

    def _ended_rightly(self, row) -> None:
        if row.state == SUCCEEDED:
            return
        reason = reason_of(row)
        if row.state == CANCELLED:
            if reason == "OPERATION_CANCELLED":
                assert row.id in self.cancelled
            else:
                assert reason == "DEADLINE_EXCEEDED"
                assert row.id in self.expired
        elif row.id in self.refused:
            assert not row.executed
        elif row.executed:
            untold = row.kind == ops.OPERATION_KIND_FORWARD_BACKWARD and reason == "INTERNAL"
            assert untold or reason in MOCK_REASONS, row
        else:
            # It was running when several workers were lost, not only cut off; or it, or one before
            # it, never came; or no worker had the memory to bring its run to it.
            assert reason in ("INTERNAL", "SEQ_GAP", "OUT_OF_MEMORY"), reason
            if "when its worker was lost" in Status.FromString(row.error).message:
                assert self.world.ended_workers > 1, "nobody has died of it"


TestOrder = Machine.TestCase
TestOrder.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
