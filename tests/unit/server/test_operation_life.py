"""The life of operations as a state machine: whatever happens in whatever order, each accepted
operation ends once, in its run's order, and every update has exactly the gradients that it should.

The coordinator and the workers' executors are the real ones; what is simulated are the streams
between them, which break and lose what the test wants.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from unit.server.simulated_fleet import FAILING_TOKEN, Killed, SimulatedWorker

from tensafe.v1 import models_pb2
from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as pb
from tensafe.v1.types_pb2 import NamedTensor
from tensafe.wire.status import from_status
from tensafe.wire.tensors import encode
from tensafe_server.app import Coordinator, Settings
from tensafe_server.fleet.dispatcher import CompanyPolicy
from tensafe_server.operations.model import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED
from tensafe_server.store.base import EventScope, OperationRow, Page
from tensafe_server.store.sqlite import SqliteStore

KINDS = ("forward_backward", "failing", "forward", "optim_step")
LOOPS = (
    ("forward_backward", "optim_step"),
    ("forward_backward", "forward_backward", "optim_step"),
    ("forward_backward", "optim_step", "forward_backward", "optim_step"),
    ("forward", "failing", "optim_step"),
    ("optim_step",),
    ("forward_backward",),
)
MIDDLES = ("nothing", "told", "told, killed", "killed", "told, coordinator dies", "cut")
ENDED = {SUCCEEDED, FAILED, CANCELLED}
MEMORY = Path("/dev/shm")
NUMBER = st.integers(0, 10**6)


def spec_of(run_id: str, seq: int, kind: str) -> pb.OperationSpec:
    """Each seq has a number of tokens of its own, so that an update tells which it was made of."""
    spec = pb.OperationSpec(run_id=run_id, seq=seq)
    if kind == "optim_step":
        spec.optim_step.SetInParent()
        return spec
    tokens = np.full(tokens_of(seq), FAILING_TOKEN if kind == "failing" else 5, np.int32)
    content = pb.Batch(
        offsets=encode(np.asarray([0, len(tokens)], np.int64)),
        input_tokens=encode(tokens),
        loss_inputs=[NamedTensor(name="target_tokens", tensor=encode(tokens))],
    )
    target = spec.forward if kind == "forward" else spec.forward_backward
    target.batch.CopyFrom(pb.Payload(inline=content))
    return spec


def tokens_of(seq: int) -> int:
    return 1 << seq % 9


@dataclass
class Client:
    """One tenant's run, as its client knows it."""

    tenant_id: str
    run_id: str
    sent: dict[int, str] = field(default_factory=dict)  # seq: kind
    ids: dict[int, str] = field(default_factory=dict)
    seen: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # how an operation ended
    given_up: set[int] = field(default_factory=set)  # seqs that came too late
    cursor: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def next_seq(self) -> int:
        return max([*self.sent, *self.given_up], default=0) + 1


class CountingStore(SqliteStore):
    """Counts what is read and written: whoever waits for it will go on."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(path, loop)
        self.accesses = 0
        submit = self._writer.submit

        def counted(*arguments: Any, **options: Any) -> asyncio.Future[None]:
            self.accesses += 1
            return submit(*arguments, **options)

        self._writer.submit = counted  # type: ignore[method-assign]

    async def _read(self, read: Callable[..., Any]) -> Any:
        self.accesses += 1
        return await super()._read(read)


class OperationLife(RuleBasedStateMachine):
    """Two tenants, up to two workers, one coordinator that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.loop = asyncio.new_event_loop()
        self.workers: list[SimulatedWorker] = []
        self.deaths = 0
        self.started = 0
        self.run(self._start())
        self.clients = [self.run(self._new_client(name)) for name in ("one", "two")]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    # The coordinator.

    async def _start(self) -> None:
        self.store = CountingStore(self.home / "tensafe.db", self.loop)
        # No clock decides anything here: rules do.
        chosen = Settings(self.home, company=CompanyPolicy(wait_s=0.0), worker_silence_s=3600.0)
        self.coordinator = Coordinator(chosen, self.store)
        self.coordinator._blame._return_s = 3600.0
        await self.coordinator._load()
        await self._settle()

    async def _new_client(self, name: str) -> Client:
        tenant = await self.coordinator.identity.create_tenant(name)
        model = models_pb2.Model(name="mock", accepts_any_reference=True)
        await self.coordinator._models.publish(model, {})
        request = pb.CreateRunRequest(
            request_id=uuid.uuid4().hex, config=pb.RunConfig(model_ref="mock", seed=1)
        )
        run = await self.coordinator._runs.create(tenant.id, request)
        return Client(tenant.id, run.id)

    async def _settle(self) -> None:
        """Lets everything happen that waits for nothing but commits and reads, so that the same
        rules always lead to the same state."""
        quiet = 0
        while quiet < 2:
            before = self.store.accesses
            await self.store.flushed()
            await self.store.attempts()
            await asyncio.sleep(0)
            while self.loop._ready:  # type: ignore[attr-defined]  # noqa: ASYNC110
                await asyncio.sleep(0)
            quiet = quiet + 1 if self.store.accesses == before + 2 else 0

    async def _kill_coordinator(self) -> None:
        for worker in self.workers:
            worker.link = None
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.coordinator._server.stop(None)
        await self.store.close()

    @rule()
    def coordinator_dies(self) -> None:
        self.run(self._kill_coordinator())
        self.run(self._start())

    @rule(turns=st.integers(0, 12), which=NUMBER, kind=st.sampled_from(KINDS))
    def coordinator_dies_while_it_takes_in(self, turns: int, which: int, kind: str) -> None:
        """The client does not know what became of it, and sends the same again."""
        client = self.clients[which % 2]
        spec = spec_of(client.run_id, client.next_seq, kind)

        async def half() -> None:
            submitting = asyncio.ensure_future(
                self.coordinator._intake.submit(client.tenant_id, [spec], "s")
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            submitting.cancel()

        self.run(half())
        self.coordinator_dies()
        self._submit(client, [(spec.seq, kind)])

    @rule()
    def workers_have_had_time_to_come_back(self) -> None:
        self._call(self.coordinator._blame._judge)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls something that is called from the event loop."""

        async def call() -> None:
            function(*arguments)
            await self._settle()

        self.run(call())

    # The clients.

    def _submit(self, client: Client, operations: list[tuple[int, str]]) -> list[Any]:
        specs = [spec_of(client.run_id, seq, kind) for seq, kind in operations]
        outcomes = self.run(self.coordinator._intake.submit(client.tenant_id, specs, "s"))
        for (seq, kind), outcome in zip(operations, outcomes, strict=True):
            if outcome.error is None:
                assert client.ids.setdefault(seq, outcome.operation_id) == outcome.operation_id
                assert client.sent.setdefault(seq, kind) == kind
        self.run(self._settle())
        return outcomes

    @rule(which=NUMBER, kinds=st.sampled_from(LOOPS))
    def submit(self, which: int, kinds: tuple[str, ...]) -> None:
        client = self.clients[which % 2]
        outcomes = self._submit(client, list(enumerate(kinds, client.next_seq)))
        assert not any(outcome.error for outcome in outcomes)

    @rule(which=NUMBER, kind=st.sampled_from(KINDS))
    def submit_ahead_of_one_that_is_missing(self, which: int, kind: str) -> None:
        client = self.clients[which % 2]
        [outcome] = self._submit(client, [(client.next_seq + 1, kind)])
        assert outcome.error is None

    @rule(which=NUMBER)
    def fill_the_gaps(self, which: int) -> None:
        client = self.clients[which % 2]
        for seq in range(1, client.next_seq):
            if seq not in client.sent and seq not in client.given_up:
                [outcome] = self._submit(client, [(seq, "forward_backward")])
                if outcome.error is not None:
                    assert from_status(outcome.error).reason == "SEQ_CONFLICT"
                    client.given_up.add(seq)

    @rule(which=NUMBER)
    def attach(self, which: int) -> None:
        """What is missing never comes."""
        run = self.coordinator._ledger.runs[self.clients[which % 2].run_id]
        self.run(self.coordinator._gaps.close(run))
        self.run(self._settle())

    @precondition(lambda self: any(client.ids for client in self.clients))
    @rule(which=NUMBER)
    def send_again(self, which: int) -> None:
        client = next(c for c in (self.clients[which % 2], *self.clients) if c.ids)
        seq = sorted(client.ids)[which % len(client.ids)]
        [outcome] = self._submit(client, [(seq, client.sent[seq])])
        assert outcome.operation_id == client.ids[seq]
        if outcome.error is not None:  # it has ended without ever having run
            row = next(row for row in self._log(client) if row.seq == seq)
            assert (row.state, row.executed) == (FAILED, 0)
            assert outcome.error.SerializeToString() == row.error
        other = "optim_step" if client.sent[seq] != "optim_step" else "forward"
        [outcome] = self._submit_only(client, seq, other)
        assert from_status(outcome.error).reason == "SEQ_CONFLICT"

    def _submit_only(self, client: Client, seq: int, kind: str) -> list[Any]:
        specs = [spec_of(client.run_id, seq, kind)]
        return self.run(self.coordinator._intake.submit(client.tenant_id, specs, "s"))

    @precondition(lambda self: any(client.ids for client in self.clients))
    @rule(which=NUMBER)
    def cancel(self, which: int) -> None:
        client = next(c for c in (self.clients[which % 2], *self.clients) if c.ids)
        seq = sorted(client.ids)[which % len(client.ids)]
        operation = self.coordinator._ledger.pending(client.ids[seq])
        if operation is not None:
            cancelling = self.coordinator._cancellation.cancel(operation)
            self._call(self.loop.create_task, cancelling)

    # The workers.

    @precondition(lambda self: len(self.workers) < 2)
    @rule()
    def worker_starts(self) -> None:
        self.started += 1
        self.workers.append(SimulatedWorker(f"process-{self.started}"))
        self._connect(self.workers[-1])

    def _connect(self, worker: SimulatedWorker) -> None:
        worker.link = self.run(self.coordinator._reception.arrive(worker.register()))
        self.run(self._settle())

    def _worker(self, which: int) -> SimulatedWorker:
        return self.workers[which % len(self.workers)]

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_comes_back(self, which: int) -> None:
        """Also over a second stream, while the coordinator still believes in the first."""
        self._connect(self._worker(which))

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_reads(self, which: int) -> None:
        worker = self._worker(which)
        if worker.link is not None:
            worker.read()

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_tells(self, which: int) -> None:
        """Over a stream that the coordinator may have closed meanwhile."""
        worker = self._worker(which)
        if worker.link is not None:
            self.run(self.coordinator._reception.report(worker.link, worker.news()))
            self.run(self._settle())
            if worker.link is not None and worker.link.closed:
                worker.link = None

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER, middle=st.sampled_from(MIDDLES))
    def worker_works(self, which: int, middle: str) -> None:
        worker = self._worker(which)

        def between() -> None:
            nonlocal middle
            now, middle = middle, "nothing"
            if now.startswith("told"):
                self.worker_tells(self.workers.index(worker))
            if now.endswith("killed"):
                self._lose(worker)
                raise Killed
            if now.endswith("dies"):
                self.coordinator_dies()
            if now == "cut":
                self._break(worker)

        with suppress(Killed):
            worker.work(between)

    @precondition(lambda self: any(worker.link for worker in self.workers))
    @rule(which=NUMBER, times=st.integers(2, 12))
    def worker_is_left_in_peace(self, which: int, times: int) -> None:
        connected = [number for number, one in enumerate(self.workers) if one.link is not None]
        number = connected[which % len(connected)]
        for _ in range(times):
            self.worker_reads(number)
            self.worker_works(number, "nothing")
            self.worker_tells(number)

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_dies(self, which: int) -> None:
        self._lose(self._worker(which))

    def _lose(self, worker: SimulatedWorker) -> None:
        self.workers.remove(worker)
        self.deaths += 1
        self._break(worker)

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def stream_breaks(self, which: int) -> None:
        self._break(self._worker(which))

    def _break(self, worker: SimulatedWorker) -> None:
        if worker.link is not None:
            self.run(self.coordinator._reception.leave(worker.link))
            worker.link = None
            self.run(self._settle())

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_is_taken_for_dead(self, which: int) -> None:
        """It goes on, and may tell what it did over a stream that it does not know to be closed."""
        worker = self._worker(which)
        if worker.link is not None and not worker.link.closed:
            self._call(self.coordinator._reception._take_for_dead, worker.link, "silence")

    @precondition(lambda self: self.workers)
    @rule(which=NUMBER)
    def worker_leaves(self, which: int) -> None:
        worker = self._worker(which)
        if worker.link is not None:
            self._call(self.coordinator._reception.goodbye, worker.link)
            self._break(worker)
            self.workers.remove(worker)

    # What must hold.

    @invariant()
    def an_outcome_is_one_for_ever_and_told_once(self) -> None:
        for client in self.clients:
            for row in self._log(client):
                if row.state not in ENDED:
                    assert row.id not in client.seen, f"{row.id} had ended"
                    assert row.state in (QUEUED, RUNNING)
                    continue
                ending = (row.state, row.result, row.error, row.cursor, row.executed)
                assert client.seen.setdefault(row.id, ending) == ending
            self.run(self._follow(client))
            assert len(set(client.told)) == len(client.told)
            assert set(client.told) == set(client.seen)

    async def _follow(self, client: Client) -> None:
        """Reads what was told since the last time, as a watcher that comes back."""
        scope = EventScope(client.tenant_id)
        hub = self.coordinator._hub
        async for events, cursor in hub.stream(scope, client.cursor, follow=False):
            assert cursor >= client.cursor
            client.cursor = cursor
            client.told += [event.operation.id for event in events]

    def _log(self, client: Client) -> list[OperationRow]:
        """The run's operations as they are on disk, by seq."""
        page = Page(10_000)
        rows = self.run(self.store.operations(client.tenant_id, client.run_id, [], page))
        return sorted((row for _, row in rows), key=lambda row: row.seq or 0)

    def teardown(self) -> None:
        try:
            self._finish()
        finally:
            self.run(self._kill_coordinator())
            self.loop.close()
            shutil.rmtree(self.home)

    def _finish(self) -> None:
        """Everything comes to its end once one worker is well and nobody disturbs it."""
        for number in range(len(self.clients)):
            self.fill_the_gaps(number)
        for worker in list(self.workers):
            self._lose(worker)
        self.workers_have_had_time_to_come_back()
        self.worker_starts()
        [worker] = self.workers
        for _ in range(60 * (1 + sum(len(client.sent) for client in self.clients))):
            if not self.coordinator._ledger.unfinished:
                break
            worker.read()
            worker.work()
            self.worker_tells(0)
        assert not self.coordinator._ledger.unfinished, "it hangs"
        self.an_outcome_is_one_for_ever_and_told_once()
        for client in self.clients:
            note(f"{client.run_id}: {client.sent}")
            self._audit(client)

    def _audit(self, client: Client) -> None:
        """Compares the log with what its operations would give one after the other."""
        rows = self._log(client)
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1)), "every seq once"
        assert {row.seq: row.id for row in rows}.items() >= client.ids.items()
        step, tokens, gradients, poisoned = 0, 0, 0, False
        updates = []
        for row in rows:
            reason = from_status(_status(row)).reason if row.error is not None else ""
            if reason == "INTERNAL":
                assert self.deaths >= 2, "only what loses workers is given up"
            kind = client.sent.get(row.seq or 0, "missing")
            if kind == "forward_backward" and row.state == SUCCEEDED:
                gradients, tokens = gradients + 1, tokens + tokens_of(row.seq or 0)
            elif kind in ("forward_backward", "failing", "missing"):
                assert row.state != SUCCEEDED
                poisoned = True
            elif kind == "optim_step" and row.executed:
                expected = "WINDOW_POISONED" if poisoned else "" if gradients else "EMPTY_WINDOW"
                assert reason == expected
                if not reason:
                    step += 1
                    updates.append((step, float(tokens)))
                    result = ops.OperationResult.FromString(row.result or b"")
                    assert (result.optim_step.step, result.optim_step.applied) == (step, True)
                tokens, gradients, poisoned = 0, 0, False
        run = self.coordinator._ledger.runs[client.run_id]
        assert (run.step, run.replay_mismatches) == (step, 0)
        assert self._updates(client) == updates, "each gradient counts once, in its own update"
        succeeded = [row.cursor for row in rows if row.state == SUCCEEDED]
        assert succeeded == sorted(succeeded)
        assert self.run(self.store.attempts()) == [] or self.deaths

    def _updates(self, client: Client) -> list[tuple[int, float]]:
        scope = EventScope(client.tenant_id, include_metrics=True, include_operations=False)
        items = self.run(self.store.step_metrics(scope, 0, 2**62, 10_000))
        return [
            (item.step, next(value.value for value in item.values if value.name == "tokens"))
            for item in items
        ]


def _status(row: OperationRow) -> Any:
    from google.rpc.status_pb2 import Status

    return Status.FromString(row.error or b"")


TestOperationLife = OperationLife.TestCase
TestOperationLife.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
