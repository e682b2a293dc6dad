"""A coordinator and workers in one process without threads or network, one move at a time.

The parts are those of `order_parts.py`: the real ones, from the store to the worker's executor,
which is driven by hand instead of by its thread. What a network or a kill may do to them are moves
too.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault.order_parts import Coordinator, CountingStore, Host, Worker

from tensafe.v1 import admin_pb2 as admin
from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import types_pb2 as types
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import DeleteArtifactRequest
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import encode
from tensafe_server.api import guard
from tensafe_server.api.files import ArtifactUpload
from tensafe_server.api.submit_streams import RequestStreams
from tensafe_server.api.training import TrainingServicer
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.operations.intake import Outcome
from tensafe_server.operations.lookup import OperationReader, draining
from tensafe_server.operations.model import RUNNING
from tensafe_server.operations.runs import RunBook
from tensafe_server.operations.snapshots import new_snapshot_id
from tensafe_server.store.base import EventScope, OperationRow, Page, TenantRow
from tensafe_server.tenants.identity import Identity, Principal

TENANT = "ten-1"
LATER_S = 3600


def forward_backward(tokens: Sequence[int] = (1, 2)) -> training.ForwardBackward:
    """Of one document; without tokens, one that is refused."""
    row = encode(np.array(tokens, np.int32))
    content = training.Batch(
        offsets=encode(np.array([0, len(tokens)], np.int64)),
        input_tokens=row,
        loss_inputs=[types.NamedTensor(name="target_tokens", tensor=row)],
    )
    return training.ForwardBackward(batch=training.Payload(inline=content))


def sample(tokens: int) -> training.Sample:
    """Takes so many steps of the mock's sampler."""
    params = training.SamplingParams(max_tokens=tokens)
    return training.Sample(prompts=[training.Prompt(text="x")], params=params, stream=True)


@dataclass(frozen=True)
class Backup:
    """What was in the data directory, and of what a client had sent by then, at one time."""

    folder: Path
    specs: dict[str, training.OperationSpec]
    next_seq: dict[str, int]
    skipped: dict[str, list[int]]
    outcomes: Counter[str]


class World:
    """A coordinator, its workers, what lies between them, and a tenant's runs.

    Attributes:
        specs: of everything that was sent and answered, by operation.
        next_seq: of each run, the first seq that nothing was sent with, nor behind.
        skipped: of each run, the seqs before it that nothing was sent with.
        backup: the last one that was made.
        ended_workers: processes that are gone for good.
    """

    def __init__(self, runs: int, workers: int = 1) -> None:
        self.loop = asyncio.new_event_loop()
        self.home = Path(tempfile.mkdtemp(prefix="order-"))
        self.cancels: list[asyncio.Future[Any]] = []
        self.specs: dict[str, training.OperationSpec] = {}
        self.next_seq: dict[str, int] = {}
        self.skipped: dict[str, list[int]] = {}
        self.backup: Backup | None = None
        self.ended_workers = 0
        self._lane = self._deletions = self._backups = 0
        self.do(self._begin(runs, workers))

    async def _begin(self, runs: int, workers: int) -> None:
        self.store = await CountingStore.open(self.home / "store.db")
        self.blobs = LocalBlobStore(self.home / "blobs")
        await self.store.add_tenant(TenantRow(TENANT, "t", 1))
        await self.store.put_model(Model(name="mock", accepts_any_reference=True))
        self.coordinator = Coordinator(self.store, self.blobs)
        await self.coordinator.load()
        self.hosts = [Host(self.home / "blobs", f"w{number}") for number in range(workers)]
        for number in range(runs):
            config = training.RunConfig(model_ref="any", seed=number)
            request = training.CreateRunRequest(request_id=f"request-{number}", config=config)
            book = RunBook(
                *(self.store, self.coordinator.ledger, self.coordinator.models),
                self.coordinator.privacy.configs,
            )
            run = await book.create(TENANT, request)
            self.next_seq[run.id], self.skipped[run.id] = 1, []
        for number in range(workers):
            await self.connect(number)

    @property
    def worker(self) -> Worker:
        """The first one."""
        return self.hosts[0].worker

    @property
    def link(self) -> WorkerLink | None:
        """Of the first worker."""
        return self.hosts[0].link

    def do(self, move: Coroutine[Any, Any, Any]) -> Any:
        """Makes a move, and lets everything follow from it that follows by itself."""
        result = self.loop.run_until_complete(move)
        self.loop.run_until_complete(self._settle())
        return result

    async def _settle(self) -> None:
        quiet = 0
        while quiet < 3:  # a commit's echo may be on its way from the writer's thread
            await self.store.flushed()
            await asyncio.sleep(0)
            waiting = [task for task in asyncio.all_tasks() if task not in self._patient()]
            if waiting:
                await asyncio.wait(waiting)
            is_quiet = not (waiting or self.loop._ready)  # type: ignore[attr-defined]
            quiet = quiet + 1 if is_quiet else 0

    def _patient(self) -> set[Any]:
        """Tasks that rightly wait for a move."""
        withdrawing = self.coordinator.cancellation._tasks
        return {*self.cancels, *withdrawing, asyncio.current_task()}

    # Moves of a client.

    async def submit(self, run_id: str, *, deadline: bool = False, **operation: Any) -> str:
        """Sends the run's next operation; `deadline`: one that has a time to live."""
        [outcome] = await self.send([self.next(run_id, deadline=deadline, **operation)])
        assert outcome.error is None, outcome
        return outcome.operation_id

    def next(self, run_id: str, *, deadline: bool = False, **operation: Any) -> Any:
        """The run's next operation."""
        spec = training.OperationSpec(run_id=run_id, seq=self.next_seq[run_id], **operation)
        if deadline:
            spec.time_to_live.FromSeconds(LATER_S)
        self.next_seq[run_id] += 1
        return spec

    def skip(self, run_id: str) -> None:
        """What is sent next leaves a gap."""
        self.skipped[run_id].append(self.next_seq[run_id])
        self.next_seq[run_id] += 1

    async def submit_lane(self, tokens: int) -> str:
        message = sample(tokens)
        message.weights.base_model = "any"
        self._lane += 1
        name = f"request-lane-{self._lane}"
        [outcome] = await self.send([training.OperationSpec(request_id=name, sample=message)])
        return outcome.operation_id

    async def send(self, specs: Sequence[training.OperationSpec]) -> list[Outcome]:
        """One call with all of these."""
        outcomes = await self.coordinator.intake.submit(TENANT, specs, "")
        for spec, outcome in zip(specs, outcomes, strict=True):
            if outcome.operation_id and not outcome.repeated:
                assert outcome.operation_id not in self.specs, "accepted twice"
                self.specs[outcome.operation_id] = spec
        return outcomes

    async def send_and_hang_up(self, spec: training.OperationSpec) -> Outcome:
        """The caller is gone before it is answered, and sends the same again."""
        unheard = self.loop.create_task(self.coordinator.intake.submit(TENANT, [spec], ""))
        await asyncio.sleep(0)
        unheard.cancel()
        await asyncio.wait([unheard])
        [outcome] = await self.coordinator.intake.submit(TENANT, [spec], "")
        self.specs[outcome.operation_id] = spec
        return outcome

    async def newest_artifact(self, run_id: str) -> str | None:
        """Of those that the run has saved and that are there."""
        found = await self.store.artifacts(TENANT, run_id, Page(1), time.time_ns())
        return found[0][1].id if found else None

    async def delete_artifact(self, artifact_id: str) -> bool:
        """Whether nothing needs it."""
        self._deletions += 1
        name = f"request-delete-{self._deletions}"
        request = DeleteArtifactRequest(artifact_id=artifact_id, request_id=name)
        try:
            await self.coordinator.artifacts.delete(TENANT, request)
        except TenSafeFault as fault:
            return fault.detail.reason != "ARTIFACT_IN_USE"
        return True

    async def close_gap(self, run_id: str) -> None:
        """Nobody fills it in time."""
        await self.coordinator.gaps.close(self.coordinator.ledger.runs[run_id])
        self.skipped[run_id].clear()

    async def delete_run(self, run_id: str, book: type[RunBook] = RunBook) -> None:
        parts = self.coordinator
        servicer = TrainingServicer(
            book(self.store, parts.ledger, parts.models, parts.privacy.configs),
            *(
                parts.ledger,
                parts.intake,
                OperationReader(self.store, parts.ledger, parts.payloads),
            ),
            *(parts.gaps, parts.cancellation, parts.dispatcher, parts.hub),
            *(parts.reception._verifications, parts.pruner),
            RequestStreams(Identity(self.store)),
        )
        guard._caller.set(Principal(admin.KEY_KIND_TENANT, TENANT, "key"))
        request = training.DeleteRunRequest(run_id=run_id, request_id=f"request-{run_id}")
        await servicer.DeleteRun(request, None)

    async def cancel(self, operation_id: str) -> bool:
        """Whether there was something to cancel."""
        pending = self.coordinator.ledger.pending(operation_id)
        if pending is not None:
            cancelling = self.coordinator.cancellation.cancel(pending)
            self.cancels.append(self.loop.create_task(cancelling))
        return pending is not None

    async def pass_deadline(self, operation_id: str) -> bool:
        """An operation's time to live is over, also for whoever reads the store from now on;
        whether it had one."""
        pending = self.coordinator.ledger.pending(operation_id)
        await self.store._execute(
            "UPDATE operations SET deadline_ns = 1 WHERE id = ? AND deadline_ns IS NOT NULL",
            (operation_id,),
        )
        if pending is None or pending.deadline_timer is None:
            return False
        pending.deadline_timer.cancel()
        self.coordinator.cancellation._expire(pending)
        return True

    # Moves of workers, and of what lies between.

    async def deliver(self, at: int = 0) -> bool:
        """What the coordinator has sent arrives."""
        host = self.hosts[at]
        if host.link is None or not host.link._outbox:
            return False
        host.worker.take(await host.link.next_messages())
        return True

    async def report(self, at: int = 0) -> bool:
        """What the worker has to say arrives, also over a stream that is fenced off."""
        host = self.hosts[at]
        link = host.link or host.fenced
        if link is None:
            return False
        report = host.worker.report()
        if report is not None:
            await self.coordinator.reception.report(link, report)
        return report is not None

    async def lose_a_report(self, at: int = 0) -> None:
        """The stream breaks with what the worker had to say."""
        self.hosts[at].worker.report()
        await self.cut(at)

    async def cut(self, at: int = 0) -> None:
        """The stream breaks; what was under way is lost."""
        host = self.hosts[at]
        if host.link is not None:
            await self.coordinator.reception.leave(host.link)
        host.link = host.fenced = None

    async def fence(self, at: int = 0) -> None:
        """The worker is taken for dead, and does not know it."""
        host = self.hosts[at]
        if host.link is not None:
            self.coordinator.reception._take_for_dead(host.link, "nothing was heard")
            host.link, host.fenced = None, host.link

    async def connect(self, at: int = 0) -> None:
        """The worker connects, if it is not connected."""
        host = self.hosts[at]
        host.fenced = None
        if host.link is None:
            host.worker.transfers.reception = self.coordinator.reception
            host.link = await self.coordinator.reception.arrive(host.worker.register())

    async def kill_worker(self, at: int = 0) -> None:
        await self.cut(at)
        await self._replace(at)

    async def drain_worker(self, at: int = 0) -> None:
        """The worker leaves by itself, with what is at hand done and told."""
        host = self.hosts[at]
        if host.link is not None:
            self.coordinator.reception.goodbye(host.link)
            await self.report(at)
            await self.cut(at)
        await self._replace(at)

    async def _replace(self, at: int) -> None:
        self.ended_workers += 1
        self.hosts[at].close()
        self.hosts[at].start()
        await self.connect(at)

    async def restart(self) -> None:
        """The coordinator is killed and comes back; the workers are still there."""
        await self._end()
        await self._begin_anew()

    async def back_up(self) -> None:
        """Keeps the data directory as it is now."""
        await self.store.flushed()
        folder = self.home / f"backup-{self._backups}"
        self._backups += 1
        shutil.copytree(self.home / "blobs", folder / "blobs")
        source = sqlite3.connect(self.home / "store.db")
        with closing(source), closing(sqlite3.connect(folder / "store.db")) as copy:
            source.backup(copy)
        self.backup = Backup(
            folder,
            dict(self.specs),
            dict(self.next_seq),
            {run_id: list(seqs) for run_id, seqs in self.skipped.items()},
            self.store.outcomes.copy(),
        )

    async def put_back(self) -> bool:
        """The coordinator is killed, and the backup is in the directory when it comes back: what
        was accepted since is lost, and the workers are where they were. Whether there is one."""
        kept = self.backup
        if kept is None:
            return False
        await self._end()
        await self.store.close()
        for path in self.home.glob("store.db*"):
            path.unlink()
        shutil.copy(kept.folder / "store.db", self.home / "store.db")
        shutil.rmtree(self.home / "blobs")
        shutil.copytree(kept.folder / "blobs", self.home / "blobs")
        self.specs, self.next_seq = dict(kept.specs), dict(kept.next_seq)
        self.skipped = {run_id: list(seqs) for run_id, seqs in kept.skipped.items()}
        self.store = await CountingStore.open(self.home / "store.db")
        self.store.outcomes = kept.outcomes.copy()
        await self._begin_anew()
        return True

    async def _end(self) -> None:
        await self.store.flushed()
        for host in self.hosts:
            if host.link is not None:
                host.link.close()
            host.link = host.fenced = None
        for task in (*self.cancels, *self.coordinator.cancellation._tasks):
            task.cancel()
        self.cancels.clear()

    async def _begin_anew(self) -> None:
        self.coordinator = Coordinator(self.store, self.blobs)
        await self.coordinator.load()
        for host in self.hosts:
            host.worker.transfers.reception = self.coordinator.reception

    async def drain(self, spec: training.OperationSpec) -> None:
        """The coordinator ends in order; what comes meanwhile is refused."""
        self.coordinator.intake.draining = draining()
        for host in self.hosts:
            if host.link is not None:
                host.link.draining = True
        with pytest.raises(TenSafeFault, match="about to stop"):
            await self.coordinator.intake.submit(TENANT, [spec], "")
        await self.restart()

    async def snapshot(self, run_id: str, at: int = 0) -> str | None:
        """The worker stores a snapshot of a run; returns why it is not kept."""
        host = self.hosts[at]
        run = self.coordinator.ledger.runs[run_id]
        held = host.worker.executor._runs.get(run_id)
        if host.link is None or held is None or not held.is_held or not held.last_seq:
            return "the worker has nothing"
        header = pb.SnapshotHeader(
            worker_id=host.link.id,
            run_id=run_id,
            epoch=held.epoch,
            seq=held.last_seq,
            step=host.worker.backend.capture(run_id).step,
        )
        if refusal := self.coordinator.book.refusal(header):
            return refusal
        if any(not op.is_sample for seq, op in run.by_seq.items() if seq <= held.last_seq):
            return "it would wait for outcomes"
        name = new_snapshot_id()
        upload = ArtifactUpload(self.blobs, name, "snapshots")
        for chunk in host.worker.captured(run_id):
            await upload.take(chunk)
        return await self.coordinator.book.keep(name, header, upload.files())

    async def prune(self, run_id: str) -> None:
        await self.coordinator.pruner.prune(self.coordinator.ledger.runs[run_id])

    # What came of it.

    def finish(self) -> None:
        """Everything goes on to its end."""
        for run_id in self.skipped:
            self.do(self.close_gap(run_id))
        for at in range(len(self.hosts)):
            self.do(self.connect(at))
        self.do(self.judge())
        for _ in range(10_000):
            moved = False
            for at, host in enumerate(self.hosts):
                moved |= self.do(self.deliver(at))
                moved |= host.worker.execute()
                moved |= host.worker.draw()
                moved |= self.do(self.report(at))
            if not moved:
                break
        assert self.coordinator.ledger.unfinished == 0, self.coordinator.ledger._pending

    async def judge(self) -> None:
        """Whoever has not come back by now is lost."""
        blame = self.coordinator.blame
        for worker in list(blame._away):
            blame.gone(worker)

    def is_running(self, operation_id: str) -> bool:
        """Whether the coordinator knows that a worker is at it."""
        pending = self.coordinator.ledger.pending(operation_id)
        return pending is not None and pending.row.state == RUNNING

    def rows(self, run_id: str | None) -> list[OperationRow]:
        """The log of a run, in its order; None: of what belongs to none."""
        if run_id is not None:
            return list(self.do(self.store.history(run_id, 0, 10_000)))
        pages = self.do(self.store.operations(TENANT, None, [], Page(10_000)))
        return [row for _, row in pages if row.run_id is None]

    def told(self) -> list[ops.Operation]:
        """What a client is told that watches from the first event on."""

        async def read() -> list[ops.Operation]:
            stream = self.coordinator.hub.stream(EventScope(TENANT), 0, follow=False)
            return [event.operation async for page, _ in stream for event in page]

        return list(self.do(read()))

    def result(self, row: OperationRow) -> ops.OperationResult:
        data = self.do(self.coordinator.payloads.load(row.result, row.result_ref))
        return ops.OperationResult.FromString(data)

    def close(self) -> None:
        for task in (*self.cancels, *self.coordinator.cancellation._tasks):
            task.cancel()
        for host in self.hosts:
            host.close()
        self.loop.run_until_complete(self.store.close())
        self.loop.close()
        shutil.rmtree(self.home)
