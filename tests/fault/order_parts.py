"""A coordinator without a network and a worker without threads, for `order_world.py`.

Everything between the store and the mock backend is the real thing.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from tensafe.v1 import types_pb2 as types
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe.wire.status import TenSafeFault
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
from tensafe_server.operations.gaps import GapWatch
from tensafe_server.operations.intake import Intake
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.limits import Limits
from tensafe_server.operations.outcomes import Outcomes
from tensafe_server.operations.pruning import Pruner
from tensafe_server.operations.recovery import recover
from tensafe_server.operations.snapshots import RecoveryPolicy, SnapshotBook
from tensafe_server.operations.specs import SpecReader
from tensafe_server.privacy.parts import PrivacyParts
from tensafe_server.store.base import Finish
from tensafe_server.store.sqlite import SqliteStore
from workers import wire
from workers.agenda import Item
from workers.executor import Executor
from workers.mock import MockBackend
from workers.operations import LossOutcome, StepOutcome, StepRequest
from workers.progress import Claim
from workers.transfers import file_chunks


class _Backend(MockBackend):
    """Takes part in all that a real one does, and little at a time.

    Attributes:
        scarce: calls for which it has no memory, and how often. They fail before they have done
            anything, so that it is not the backend that closes a window behind them; but
            `untold` is a gradient that was added, of which nothing can be told.
    """

    instant = False
    credits = 6
    group_tokens = 64
    sample_tokens = 64

    def __init__(self) -> None:
        super().__init__()
        self.scarce: Counter[str] = Counter()

    def open_run(self, run_id: str, *arguments: Any) -> None:
        self._allocate("open_run")
        super().open_run(run_id, *arguments)

    def forward_backward(self, run_id: str, *arguments: Any) -> LossOutcome:
        self._allocate("forward_backward")
        outcome = super().forward_backward(run_id, *arguments)
        if self.scarce["untold"]:
            self.scarce["untold"] -= 1
            outcome.outputs = None  # type: ignore[assignment]
        return outcome

    def optim_step(self, run_id: str, request: StepRequest) -> StepOutcome:
        window = self._runs[run_id].window
        if window.is_open and not window.poisoned:
            self._allocate("optim_step")
        return super().optim_step(run_id, request)

    def _allocate(self, what: str) -> None:
        if self.scarce[what]:
            self.scarce[what] -= 1
            raise TenSafeFault("OUT_OF_MEMORY", "too little memory; use less")


class _Transfers:
    """Reads and writes the coordinator's blobs.

    Attributes:
        reception: of the coordinator's life at the time.
    """

    reception: Reception

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs

    def fetch_snapshot(self, snapshot_id: str, directory: Path) -> None:
        folder = self._blobs / "snapshots" / snapshot_id
        shutil.copytree(folder, directory, dirs_exist_ok=True)

    def fetch(self, artifact_id: str, directory: Path) -> None:
        shutil.copytree(self._blobs / "artifacts" / artifact_id, directory, dirs_exist_ok=True)

    def upload(self, artifact_id: str, epoch: int, directory: Path) -> list[ArtifactFile]:
        self.reception.upload_fence(artifact_id, epoch)()
        folder = self._blobs / "artifacts" / artifact_id
        shutil.copytree(directory, folder, dirs_exist_ok=True)
        files = [_file(path) for path in sorted(folder.iterdir())]
        self.reception.stored(artifact_id, files)
        return files


def _file(path: Path) -> ArtifactFile:
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return ArtifactFile(name=path.name, size_bytes=len(data), sha256=sha256)


class Worker:
    """A worker's process."""

    def __init__(self, blobs: Path, name: str) -> None:
        self.name = name
        self.backend = _Backend()
        self.transfers = _Transfers(blobs)
        self.executor = Executor(self.backend, self.transfers, lambda: None)  # type: ignore[arg-type]
        self.instance = uuid4().hex

    def register(self) -> pb.Register:
        self.executor.new_stream()
        return pb.Register(
            name=self.name,
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
        items = self._next()
        self.executor._group(items)
        return bool(items)

    def begin(self) -> None:
        """Begins the next operation, which has no end: all that is left to do is to die."""
        while items := self._next():
            for item in items:
                known = isinstance(item, pb.PlannedOperation) and not (item.void or item.replay)
                if known and self.executor._progress.claim(item) is Claim.MINE:
                    return
                if not known:
                    self.executor._group([item])

    def _next(self) -> Sequence[Item]:
        executor = self.executor
        while not executor._inbox.empty():
            item = executor._inbox.get()
            assert item is not None
            executor._agenda.put(*item)
        return executor._agenda.take() if executor._agenda else []

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


class CountingStore(SqliteStore):
    """Counts how often each operation was given an outcome."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.outcomes: Counter[str] = Counter()

    def finish(
        self, finish: Finish, then: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        self.outcomes.update(row.id for row in finish.operations)
        return super().finish(finish, then)


class Host:
    """A machine with a worker.

    Attributes:
        link: the worker's stream, as both sides know it.
        fenced: a stream that the coordinator has given up, and the worker has not yet.
    """

    def __init__(self, blobs: Path, name: str) -> None:
        self._blobs = blobs
        self._name = name
        self.link: WorkerLink | None = None
        self.fenced: WorkerLink | None = None
        self.start()

    def start(self) -> None:
        """Begins a new process."""
        self.worker = Worker(self._blobs, self._name)

    def close(self) -> None:
        self.worker.close()


class Coordinator:
    """One life of a coordinator, over a store that outlives it."""

    def __init__(self, store: SqliteStore, blobs: LocalBlobStore) -> None:
        self.store, self.blobs = store, blobs
        self.ledger = Ledger(voids_kept=2)
        payloads = self.payloads = Payloads(blobs)
        self.models = ModelRegistry(store, blobs)
        self.hub = EventHub(store, payloads)
        self.book = SnapshotBook(store, blobs, self.ledger, 2)
        self.privacy = PrivacyParts(store, blobs, payloads, self.ledger, self.book)
        outcomes = Outcomes(store, self.ledger, self.hub, payloads, self.privacy.outcomes)
        self.pruner = Pruner(store, blobs, payloads, self.ledger, self.book, 3600.0)
        restorer = Restorer(store, payloads, self.book, self.privacy.steps)
        specs = self.specs = SpecReader(store, payloads, self.ledger)
        self.blame = Blame(store, self.ledger, return_s=3600.0)
        self.dispatcher = Dispatcher(
            *(store, self.ledger, restorer, specs),
            *(CompanyPolicy(0.0), self.blame, self.privacy.steps),
        )
        self.cancellation = Cancellation(store, self.ledger, outcomes, self.dispatcher)
        self.artifacts = ArtifactBook(store, self.ledger, blobs)
        self.intake = Intake(
            *(store, self.ledger, self.models, payloads, self.hub, self.artifacts),
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
        self.ledger.on_disputed = self.dispatcher.dispute
        self.ledger.on_over = self.dispatcher.release
        self.gaps = GapWatch(store, self.ledger, self.hub, outcomes, 3600.0)
        self.ledger.on_gap = self.gaps.update
        self.ledger.on_deadline = self.cancellation.watch_deadline
        self.reception.on_begun = self.cancellation.end_deadlines
        self.dispatcher.on_unrestorable = self.cancellation.fail_waiting
        specs.on_missing = self.cancellation.give_up

    async def load(self) -> None:
        await self.models.load()
        await self.hub.load()
        await recover(self.store, self.payloads, self.models, self.ledger, self.specs.on_missing)
        await self.blame.load()
        await self.privacy.load()
        self.cancellation.cancel_deleted()
        self.dispatcher.kick()
