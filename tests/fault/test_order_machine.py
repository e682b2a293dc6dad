"""Whatever is submitted, cancelled, cut and killed, in whatever order: every operation ends once,
and as if a run's operations had been executed one after another, each sample on the weights of its
place."""

from __future__ import annotations

from fault.order_world import World, forward_backward, sample
from google.rpc.status_pb2 import Status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import from_status

SUCCEEDED, FAILED = ops.OPERATION_STATE_SUCCEEDED, ops.OPERATION_STATE_FAILED
RUNS = 2


class Follower:
    """A run, as its log says that its operations went, one after another."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.step = 0
        self.gradients = 0
        self.poisoned = False

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

    def optim_step(self, row) -> None:
        if row.state == SUCCEEDED:
            assert self.gradients
            assert not self.poisoned, f"half a gradient at seq {row.seq}"
            self.step += 1
            assert self.world.result(row).optim_step.step == self.step
        elif not row.executed:
            return
        else:
            reason = reason_of(row)
            assert reason == ("WINDOW_POISONED" if self.poisoned else "EMPTY_WINDOW"), reason
            assert self.poisoned or not self.gradients
        self.gradients, self.poisoned = 0, False

    def sample(self, row) -> None:
        if row.state == SUCCEEDED:
            result = self.world.result(row).sample
            assert result.model_step == self.step, f"other weights at seq {row.seq}"
            whole = f" [Mock completion for step {self.step}]"
            assert whole.startswith(result.completions[0].completion)


def reason_of(row) -> str:
    return from_status(Status.FromString(row.error)).reason


class Machine(RuleBasedStateMachine):
    operations = Bundle("operations")
    run_numbers = st.integers(0, RUNS - 1)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(RUNS)
        self.runs = list(self.world.next_seq)
        self.submitted: set[str] = set()

    def _submit(self, move) -> str:
        operation_id = self.world.do(move)
        self.submitted.add(operation_id)
        return operation_id

    def _flow(self, times: int) -> None:
        """Training goes on and is told of; nothing is drawn, so that samples stay behind."""
        self.world.do(self.world.connect())
        for _ in range(times):
            self.world.do(self.world.deliver())
            self.world.worker.execute()
            self.world.do(self.world.report())

    @rule(run=run_numbers, target=operations)
    def gradient(self, run: int) -> str:
        return self._submit(self.world.submit(self.runs[run], forward_backward=forward_backward()))

    @rule(run=run_numbers, target=operations)
    def update(self, run: int) -> str:
        return self._submit(self.world.submit(self.runs[run], optim_step=training.OptimStep()))

    @rule(run=run_numbers, steps=st.integers(1, 3), flow=st.sampled_from([0, 2, 8]))
    def train(self, run: int, steps: int, flow: int) -> None:
        for _ in range(steps):
            self.gradient(run)
            self.update(run)
        self._flow(flow)

    @rule(run=run_numbers, tokens=st.integers(2, 9), target=operations)
    def sample(self, run: int, tokens: int) -> str:
        return self._submit(self.world.submit(self.runs[run], sample=sample(tokens)))

    @rule(run=run_numbers, steps=st.integers(1, 2))
    def sample_and_train_on(self, run: int, steps: int) -> None:
        self.train(run, 1, 0)
        self.sample(run, 9)
        self.train(run, steps, 8)
        self.snapshot(run)

    @rule(tokens=st.integers(1, 5), target=operations)
    def lane(self, tokens: int) -> str:
        return self._submit(self.world.submit_lane(tokens))

    @rule(operation=operations)
    def cancel(self, operation: str) -> None:
        self.world.do(self.world.cancel(operation))

    @rule(times=st.integers(1, 6))
    def flow(self, times: int) -> None:
        self._flow(times)

    @rule(deliver=st.booleans(), executed=st.integers(0, 4), drawn=st.integers(0, 3))
    def work(self, deliver: bool, executed: int, drawn: int) -> None:
        """Nobody hears of it yet."""
        if deliver:
            self.world.do(self.world.deliver())
        for _ in range(executed):
            self.world.worker.execute()
        for _ in range(drawn):
            self.world.worker.draw()

    @rule()
    def report(self) -> None:
        self.world.do(self.world.report())

    @rule(run=run_numbers)
    def snapshot(self, run: int) -> None:
        self.world.do(self.world.snapshot(self.runs[run]))
        self.world.do(self.world.prune(self.runs[run]))

    @rule(how=st.sampled_from(["lose_a_report", "cut", "kill_worker", "kill_worker", "restart"]))
    def break_something(self, how: str) -> None:
        self.world.do(getattr(self.world, how)())

    @invariant()
    def what_is_open_is_known(self) -> None:
        for run in self.world.coordinator.ledger.runs.values():
            seqs = [operation.row.seq for operation in run.queue]
            assert seqs == sorted(seqs)

    def teardown(self) -> None:
        try:
            self.world.finish()
            ended = [row for run_id in self.runs for row in self.world.rows(run_id)]
            ended += self.world.rows(None)
            assert {row.id for row in ended} == self.submitted
            assert all(row.cursor is not None for row in ended)
            for row in ended:
                if row.state == FAILED and not row.executed:
                    # It was running when several workers were lost.
                    assert reason_of(row) == "INTERNAL", reason_of(row)
                elif row.state == FAILED:
                    assert reason_of(row) in ("WINDOW_POISONED", "EMPTY_WINDOW"), row
            for run_id in self.runs:
                Follower(self.world).follow(run_id)
            assert self.world.coordinator.replays.mismatches == 0
        finally:
            self.world.close()


TestOrder = Machine.TestCase
TestOrder.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
