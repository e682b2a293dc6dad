"""A coordinator and a worker in one process without threads or network, one move at a time.

Everything between the store and the mock backend is the real thing: the ledger, the dispatcher,
the restorer, and the worker's executor, which is driven by hand instead of by its thread. What a
network or a kill may do to them are moves too.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import types_pb2 as types
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.models_pb2 import Model
from tensafe.wire.tensors import encode
from tensafe_server.api.files import ArtifactUpload
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.events.hub import EventHub
from tensafe_server.fleet.blame import Blame
from tensafe_server.fleet.cancel import Cancellation
from tensafe_server.fleet.dispatcher import CompanyPolicy, Dispatcher
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.liveness import Liveness
from tensafe_server.fleet.reception import Reception
from tensafe_server.fleet.replay import Comparer, ReplayWatch
from tensafe_server.fleet.restore import Restorer
from tensafe_server.fleet.verify import Verifications
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.artifacts import ArtifactBook
from tensafe_server.operations.intake import Intake
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.limits import Limits
from tensafe_server.operations.outcomes import Outcomes
from tensafe_server.operations.pruning import Pruner
from tensafe_server.operations.recovery import recover
from tensafe_server.operations.runs import RunBook
from tensafe_server.operations.snapshots import RecoveryPolicy, SnapshotBook, new_snapshot_id
from tensafe_server.operations.specs import SpecReader
from tensafe_server.privacy.parts import PrivacyParts
from tensafe_server.store.base import OperationRow, Page, TenantRow
from tensafe_server.store.sqlite import SqliteStore
from workers import wire
from workers.executor import Executor
from workers.mock import MockBackend
from workers.transfers import file_chunks

TENANT = "ten-1"


def forward_backward() -> training.ForwardBackward:
    tokens = encode(np.array([1, 2], np.int32))
    content = training.Batch(
        offsets=encode(np.array([0, 2], np.int64)),
        input_tokens=tokens,
        loss_inputs=[types.NamedTensor(name="target_tokens", tensor=tokens)],
    )
    return training.ForwardBackward(batch=training.Payload(inline=content))


def sample(tokens: int) -> training.Sample:
    """Takes so many steps of the mock's sampler."""
    params = training.SamplingParams(max_tokens=tokens)
    return training.Sample(prompts=[training.Prompt(text="x")], params=params, stream=True)


class _Backend(MockBackend):
    """Takes part in all that a real one does, and little at a time."""

    instant = False
    credits = 6
    group_tokens = 64
    sample_tokens = 64


class _Transfers:
    """Reads the coordinator's blobs; nothing here saves."""

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs

    def fetch_snapshot(self, snapshot_id: str, directory: Path) -> None:
        folder = self._blobs / "snapshots" / snapshot_id
        shutil.copytree(folder, directory, dirs_exist_ok=True)


class Worker:
    """A worker's process."""

    def __init__(self, blobs: Path) -> None:
        self.backend = _Backend()
        self.executor = Executor(self.backend, _Transfers(blobs), lambda: None)  # type: ignore[arg-type]
        self.instance = uuid4().hex

    def register(self) -> pb.Register:
        self.executor.new_stream()
        return pb.Register(
            name="w",
            instance=self.instance,
            backend="mock",
            models=["mock"],
            credits=self.backend.credits,
            group_tokens=self.backend.group_tokens,
            sample_tokens=self.backend.sample_tokens,
            held_runs=self.executor.held_runs(),
        )

    def take(self, messages: Sequence[pb.ConnectResponse]) -> None:
        for message in messages:
            if message.HasField("plan"):
                self.executor.submit(message.plan)
            elif message.HasField("cancel"):
                cancel = message.cancel
                self.executor.cancel(cancel.operation_id, waiting_only=cancel.waiting_only)
            elif message.HasField("release"):
                self.executor.release(message.release.run_id)

    def execute(self) -> bool:
        """Executes the next group; False if there is none."""
        executor = self.executor
        while not executor._inbox.empty():
            item = executor._inbox.get()
            assert item is not None
            executor._agenda.put(*item)
        if not executor._agenda:
            return False
        executor._group(executor._agenda.take())
        return True

    def draw(self) -> bool:
        """Draws a token of every running sample; False if none runs."""
        if not self.executor._samples.busy:
            return False
        self.executor._samples.step()
        return True

    def report(self) -> pb.Report | None:
        """What is new, None if nothing is."""
        refused = self.executor.collect_refused()
        started, done = self.executor.collect()
        chunks = [wire.sample_chunk(*each) for each in self.executor.collect_chunks()]
        report = pb.Report(started=started, done=done, refused=refused, chunks=chunks)
        return report if report.ByteSize() else None

    def captured(self, run_id: str) -> list[types.FileChunk]:
        """A run's state as it goes into a snapshot."""
        with tempfile.TemporaryDirectory() as folder:
            self.backend.capture(run_id).write(Path(folder))
            return [chunk for path in Path(folder).iterdir() for chunk in file_chunks(path)]

    def close(self) -> None:
        self.executor._artifacts.close()


class Coordinator:
    """One life of a coordinator, over a store that outlives it."""

    def __init__(self, store: SqliteStore, blobs: LocalBlobStore) -> None:
        self.store, self.blobs = store, blobs
        self.ledger = Ledger()
        payloads = self.payloads = Payloads(blobs)
        self.models = ModelRegistry(store, blobs)
        self.hub = EventHub(store, payloads)
        self.book = SnapshotBook(store, blobs, self.ledger, 2)
        self.privacy = PrivacyParts(store, blobs, payloads, self.ledger, self.book)
        outcomes = Outcomes(store, self.ledger, self.hub, payloads, self.privacy.outcomes)
        self.pruner = Pruner(store, blobs, payloads, self.ledger, self.book, 3600.0)
        restorer = Restorer(store, payloads, self.book, self.privacy.steps)
        specs = SpecReader(store, payloads, self.ledger)
        self.blame = Blame(store, self.ledger, return_s=3600.0)
        self.dispatcher = Dispatcher(
            *(store, self.ledger, restorer, specs),
            *(CompanyPolicy(0.0), self.blame, self.privacy.steps),
        )
        self.cancellation = Cancellation(self.ledger, outcomes, self.dispatcher)
        artifacts = ArtifactBook(store, self.ledger, blobs)
        self.intake = Intake(
            *(store, self.ledger, self.models, payloads, self.hub, artifacts),
            *(Limits(), self.privacy.configs),
        )
        comparer = Comparer(store, payloads)
        self.replays = ReplayWatch(store, self.ledger, comparer, self.book)
        self.reception = Reception(
            self.ledger,
            self.models,
            outcomes,
            self.dispatcher,
            restorer,
            self.replays,
            Verifications(self.dispatcher, restorer, comparer, lambda run: None),
            RecoveryPolicy(),
            Liveness(3600.0),
            self.blame,
        )
        self.ledger.on_ready = specs.on_read = self.dispatcher.kick
        self.ledger.on_disputed = self.dispatcher.give_back
        self.ledger.on_deadline = self.cancellation.watch_deadline
        self.dispatcher.on_unrestorable = self.cancellation.fail_waiting
        specs.on_missing = self.cancellation.give_up

    async def load(self) -> None:
        await self.models.load()
        await self.hub.load()
        await recover(self.store, self.payloads, self.models, self.ledger)
        await self.blame.load()
        await self.privacy.load()
        self.dispatcher.kick()


class World:
    """A coordinator, a worker, what lies between them, and a tenant's runs."""

    def __init__(self, runs: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.home = Path(tempfile.mkdtemp(prefix="order-"))
        self.cancels: list[asyncio.Future[Any]] = []
        self.link: WorkerLink | None = None
        self.next_seq: dict[str, int] = {}
        self._lane = 0
        self.do(self._begin(runs))

    async def _begin(self, runs: int) -> None:
        self.store = await SqliteStore.open(self.home / "store.db")
        self.blobs = LocalBlobStore(self.home / "blobs")
        await self.store.add_tenant(TenantRow(TENANT, "t", 1))
        await self.store.put_model(Model(name="mock", accepts_any_reference=True))
        self.coordinator = Coordinator(self.store, self.blobs)
        await self.coordinator.load()
        self.worker = Worker(self.home / "blobs")
        for number in range(runs):
            config = training.RunConfig(model_ref="any", seed=number)
            request = training.CreateRunRequest(request_id=f"request-{number}", config=config)
            book = RunBook(
                *(self.store, self.coordinator.ledger, self.coordinator.models),
                self.coordinator.privacy.configs,
            )
            run = await book.create(TENANT, request)
            self.next_seq[run.id] = 1
        await self.connect()

    def do(self, move: Coroutine[Any, Any, Any]) -> Any:
        """Makes a move, and lets everything follow from it that follows by itself."""
        result = self.loop.run_until_complete(move)
        self.loop.run_until_complete(self._settle())
        return result

    async def _settle(self) -> None:
        for _ in range(3):
            await self.store.flushed()
            await asyncio.sleep(0)
            waiting = [task for task in asyncio.all_tasks() if task not in self._patient()]
            if waiting:
                await asyncio.wait(waiting)
            for _ in range(3):
                await asyncio.sleep(0)

    def _patient(self) -> set[Any]:
        """Tasks that rightly wait for a move."""
        return {*self.cancels, asyncio.current_task()}

    # Moves.

    async def submit(self, run_id: str, **operation: Any) -> str:
        seq = self.next_seq[run_id]
        self.next_seq[run_id] += 1
        return await self._submit(training.OperationSpec(run_id=run_id, seq=seq, **operation))

    async def submit_lane(self, tokens: int) -> str:
        message = sample(tokens)
        message.weights.base_model = "any"
        self._lane += 1
        name = f"request-lane-{self._lane}"
        return await self._submit(training.OperationSpec(request_id=name, sample=message))

    async def _submit(self, spec: training.OperationSpec) -> str:
        [outcome] = await self.coordinator.intake.submit(TENANT, [spec], "")
        assert outcome.error is None, outcome
        return outcome.operation_id

    async def cancel(self, operation_id: str) -> None:
        pending = self.coordinator.ledger.pending(operation_id)
        if pending is not None:
            cancelling = self.coordinator.cancellation.cancel(pending)
            self.cancels.append(self.loop.create_task(cancelling))

    async def deliver(self) -> bool:
        """What the coordinator has sent arrives."""
        if self.link is None or not self.link._outbox:
            return False
        self.worker.take(await self.link.next_messages())
        return True

    async def report(self) -> bool:
        """What the worker has to say arrives."""
        if self.link is None:
            return False
        report = self.worker.report()
        if report is not None:
            await self.coordinator.reception.report(self.link, report)
        return report is not None

    async def lose_a_report(self) -> None:
        """The stream breaks with what the worker had to say."""
        self.worker.report()
        await self.cut()

    async def cut(self) -> None:
        """The stream breaks; what was under way is lost."""
        if self.link is not None:
            await self.coordinator.reception.leave(self.link)
            self.link = None

    async def connect(self) -> None:
        """The worker connects, if it is not connected."""
        if self.link is None:
            self.link = await self.coordinator.reception.arrive(self.worker.register())

    async def kill_worker(self) -> None:
        await self.cut()
        self.worker.close()
        self.worker = Worker(self.home / "blobs")
        await self.connect()

    async def restart(self) -> None:
        """The coordinator is killed and comes back; the worker is still there."""
        await self.store.flushed()
        if self.link is not None:
            self.link.close()
            self.link = None
        for task in self.cancels:
            task.cancel()
        self.cancels.clear()
        self.coordinator = Coordinator(self.store, self.blobs)
        await self.coordinator.load()

    async def snapshot(self, run_id: str) -> str | None:
        """The worker stores a snapshot of a run; returns why it is not kept."""
        run = self.coordinator.ledger.runs[run_id]
        held = self.worker.executor._runs.get(run_id)
        if self.link is None or held is None or not held.is_held or not held.last_seq:
            return "the worker has nothing"
        header = pb.SnapshotHeader(
            worker_id=self.link.id,
            run_id=run_id,
            epoch=held.epoch,
            seq=held.last_seq,
            step=self.worker.backend.capture(run_id).step,
        )
        if refusal := self.coordinator.book.refusal(header):
            return refusal
        if any(not op.is_sample for seq, op in run.by_seq.items() if seq <= held.last_seq):
            return "it would wait for outcomes"
        name = new_snapshot_id()
        upload = ArtifactUpload(self.blobs, name, "snapshots")
        for chunk in self.worker.captured(run_id):
            await upload.take(chunk)
        return await self.coordinator.book.keep(name, header, upload.files())

    async def prune(self, run_id: str) -> None:
        await self.coordinator.pruner.prune(self.coordinator.ledger.runs[run_id])

    # What came of it.

    def finish(self) -> None:
        """Everything goes on to its end."""
        self.do(self.connect())
        self.do(self._judge())
        for _ in range(10_000):
            moved = self.do(self.deliver())
            moved |= self.worker.execute()
            moved |= self.worker.draw()
            moved |= self.do(self.report())
            if not moved:
                break
        assert self.coordinator.ledger.unfinished == 0, self.coordinator.ledger._pending

    async def _judge(self) -> None:
        """Whoever has not come back by now is lost."""
        self.coordinator.blame._judge()

    def rows(self, run_id: str | None) -> list[OperationRow]:
        """The log of a run, in its order; None: of what belongs to none."""
        if run_id is not None:
            return list(self.do(self.store.history(run_id, 0, 10_000)))
        pages = self.do(self.store.operations(TENANT, None, [], Page(10_000)))
        return [row for _, row in pages if row.run_id is None]

    def result(self, row: OperationRow) -> ops.OperationResult:
        data = self.do(self.coordinator.payloads.load(row.result, row.result_ref))
        return ops.OperationResult.FromString(data)

    def close(self) -> None:
        for task in self.cancels:
            task.cancel()
        self.worker.close()
        self.loop.run_until_complete(self.store.close())
        self.loop.close()
        shutil.rmtree(self.home)
