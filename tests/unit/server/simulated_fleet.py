"""Workers without threads, processes and streams: the real executor, moved step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.link import WorkerLink
from workers.executor import Executor
from workers.mock import MockBackend

FAILING_TOKEN = 7
"""A forward_backward whose first token this is fails on the worker."""


class Killed(BaseException):
    """The worker's process dies in the middle of something."""


class _Backend(MockBackend):
    """Reports what it begins, takes groups, and lets the test act in the middle of an operation."""

    instant = False
    credits = 3
    group_tokens = 1024

    def __init__(self) -> None:
        super().__init__()
        self.between: Callable[[], None] = lambda: None

    def forward_backward(self, run_id, seq, request):
        self.between()
        if request.batch.input_tokens[0] == FAILING_TOKEN:
            self.poison(run_id)
            raise TenSafeFault("NON_FINITE_LOSS", "it is NaN; look at the batch")
        return super().forward_backward(run_id, seq, request)

    def optim_step(self, run_id, request):
        outcome = super().optim_step(run_id, request)
        self.between()
        return outcome


class _NoTransfers:
    """Nothing is saved or fetched here."""

    def upload(self, artifact_id: str, epoch: int, directory: Path):
        raise AssertionError

    fetch = upload_snapshot = fetch_snapshot = upload


class SimulatedWorker:
    """One worker process.

    Attributes:
        instance: of the process.
        link: its stream; None while it has none.
    """

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.link: WorkerLink | None = None
        self._backend = _Backend()
        self._executor = Executor(self._backend, _NoTransfers(), lambda: None)

    def register(self) -> pb.Register:
        """What it says first over a new stream."""
        self._executor.new_stream()
        return pb.Register(
            name=self.instance,
            backend="mock",
            models=["mock"],
            credits=self._backend.credits,
            held_runs=self._executor.held_runs(),
            group_tokens=self._backend.group_tokens,
            fingerprint=self._backend.fingerprint(),
            instance=self.instance,
        )

    def read(self) -> None:
        """Takes what the coordinator has sent."""
        assert self.link is not None
        while self.link._outbox:
            message = self.link._outbox.popleft()
            if message.HasField("plan"):
                self._executor.submit(message.plan)
            elif message.HasField("cancel"):
                self._executor.cancel(message.cancel.operation_id)
            elif message.HasField("release"):
                self._executor.release(message.release.run_id)

    def work(self, between: Callable[[], None] = lambda: None) -> None:
        """Executes what is next; calls `between` in the middle of each operation.

        Raises:
            Killed: it died.
        """
        self._backend.between = between
        if not self._executor.idle:
            self._executor.execute_next()

    def news(self) -> pb.Report:
        """What it has to tell."""
        started, done = self._executor.collect()
        return pb.Report(started=started, done=done)
