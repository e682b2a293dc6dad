"""One connected worker: what it can run, what it has, and its outgoing messages."""

from __future__ import annotations

import asyncio
from collections import deque

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.groups import GroupBook
from tensafe_server.operations.checks import BACKWARD_FACTOR
from tensafe_server.operations.comparison import fingerprint_digest
from tensafe_server.planning.views import Arrivals, Kind, SampleRoom, Work, WorkerView

_MESSAGE_BYTES = 16 * 2**20
# Samples that lie at a worker: as many as it generates at once, and as many to follow them. They
# stay long, so that some credits are never theirs.
_TIMES_FULL = 2
_CREDITS_FOR_SAMPLES = 0.5


class WorkerLink:
    """A worker's stream, seen from the dispatcher.

    Attributes:
        instance: of the worker's process, which may come back over another stream.
        digest: of its fingerprint; workers of one digest give the same results.
        runs: ids of the runs whose state it holds.
        group_cost: most cost that it gains by executing together; 0: it takes no groups.
        sample_cost: most cost of samples that it generates at once; 0: it executes them one by one.
        groups: what it has, in the order in which it executes it.
        outstanding: operations that the worker has and that have not ended, by id, in the order in
            which they were sent.
        draining: it takes no new work.
        departing: it has said goodbye.
        ended_by: why the coordinator ended the stream; None if it was the worker.
        left: what it had was taken back.
        receiving: something that it sent is being worked on.
        last_heard_s: when it last sent something, on the event loop's clock.
    """

    def __init__(self, worker_id: str, register: pb.Register) -> None:
        self.id = worker_id
        self.name = register.name
        self.instance = register.instance
        self.backend = register.backend
        self.device = register.device
        self.models = frozenset(register.models)
        self.credits = register.credits
        self.fingerprint = dict(register.fingerprint)
        self.digest = fingerprint_digest(self.fingerprint)
        self.group_cost = BACKWARD_FACTOR * register.group_tokens
        self.sample_cost = float(register.sample_tokens)
        self.groups = GroupBook(generates=self.sample_cost > 0)
        self.outstanding: dict[str, Work] = {}
        self._samples = 0
        self._samples_cost = 0.0
        self.runs: set[str] = set()
        self.draining = False
        self.departing = False
        self.ended_by: TenSafeFault | None = None
        self.left = False
        self.receiving = False
        self.last_heard_s = 0.0
        self.closed = False
        self._outbox: deque[pb.ConnectResponse] = deque()
        self._wake = asyncio.Event()

    def view(
        self, company: frozenset[str] = frozenset(), arrivals: Arrivals = Arrivals.NONE
    ) -> WorkerView:
        """What the planner sees.

        Args:
            company: models of which runs may soon go on.
            arrivals: what is on its way to the worker.
        """
        groups = self.groups
        return WorkerView(
            self.id,
            self.models,
            self.free_credits,
            len(self.runs),
            self.group_cost,
            groups.waiting(),
            groups.plans,
            groups.next,
            self.idle,
            company,
            arrivals,
            self._sample_room(),
        )

    @property
    def free_credits(self) -> int:
        """How many more operations it takes."""
        return 0 if self.draining else max(0, self.credits - len(self.outstanding))

    @property
    def idle(self) -> bool:
        """Whether it takes groups and has nothing to do."""
        return self.group_cost > 0 and not (self.groups.first() or self._samples)

    def give(self, operation_id: str, work: Work) -> None:
        """Notes an operation that is sent."""
        self.outstanding[operation_id] = work
        if work.kind is Kind.SAMPLE:
            self._samples += 1
            self._samples_cost += work.cost

    def free(self, operation_id: str) -> None:
        """Gives the worker back the credit of an operation that is over."""
        work = self.outstanding.pop(operation_id, None)
        if work is not None and work.kind is Kind.SAMPLE:
            self._samples -= 1
            self._samples_cost -= work.cost

    def _sample_room(self) -> SampleRoom | None:
        if not self.sample_cost:
            return None
        most = max(1, round(_CREDITS_FOR_SAMPLES * self.credits))
        room = _TIMES_FULL * self.sample_cost - self._samples_cost
        return SampleRoom(room, most - self._samples)

    def heard(self) -> None:
        """Notes a sign of life."""
        self.last_heard_s = asyncio.get_running_loop().time()

    def send(self, message: pb.ConnectResponse) -> None:
        self._outbox.append(message)
        self._wake.set()

    def send_plan(self, plan: pb.Plan) -> None:
        """Sends work, cut into messages that the transport carries."""
        if plan.ByteSize() <= _MESSAGE_BYTES:
            self.send(pb.ConnectResponse(plan=plan))
            return
        part = pb.Plan(runs=plan.runs)
        size = 0
        for operation in plan.operations:
            if size and size + len(operation.spec) > _MESSAGE_BYTES:
                self.send(pb.ConnectResponse(plan=part))
                part, size = pb.Plan(), 0
            part.operations.append(operation)
            size += len(operation.spec)
        self.send(pb.ConnectResponse(plan=part))

    def close(self, why: TenSafeFault | None = None) -> None:
        """Ends the stream; the worker is told why."""
        self.ended_by = self.ended_by or why
        self.closed = True
        self._wake.set()

    async def next_messages(self) -> list[pb.ConnectResponse]:
        """Waits for outgoing messages; an empty list means that the link was closed."""
        while not self._outbox and not self.closed:
            self._wake.clear()
            await self._wake.wait()
        messages = list(self._outbox)
        self._outbox.clear()
        return messages
