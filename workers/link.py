"""The worker's side of the stream to the coordinator: plans come down, reports go up.

A broken stream is built again for ever, with growing, jittered pauses; the runs stay here and are
named in the next Register. The executor goes on meanwhile, and its outcomes wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status

from tensafe import failpoints
from tensafe.v1 import worker_pb2, worker_pb2_grpc
from tensafe.wire.channel import client_options
from tensafe.wire.status import from_status
from tensafe.wire.tls import Address, find_mismatch, open_channel
from workers import wire
from workers.backend import Backend
from workers.executor import Executor
from workers.operations import SampleChunk
from workers.snapshots import SnapshotPolicy
from workers.transfers import GrpcTransfers
from workers.watchdog import OperationLimits, StepClock, Watchdog, end_with_stacks

if TYPE_CHECKING:
    from tensafe.v1.worker_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

_REPORT_BYTES = 8 * 2**20
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_CALL_TIMEOUT_S = 30.0
_LAST_WORDS_S = 5.0

# What no amount of trying again will mend.
_FATAL = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class LinkError(Exception):
    """The coordinator will never take this worker as it is."""


@dataclass(frozen=True)
class LinkOptions:
    """Where to connect, as whom.

    Attributes:
        address: the coordinator's.
        key: the worker key's secret.
        name: for people and logs.
        authorities: who may have signed its certificate, PEM. None: the well-known ones.
        grace_s: how long leaving may take: the operation at hand, and what comes before goodbye.
        limits: how long an operation may run before the watchdog ends the process.
    """

    address: Address
    key: str
    name: str
    authorities: bytes | None = None
    grace_s: float = 30.0
    limits: OperationLimits = field(default_factory=OperationLimits)


class Link:
    """Connects one backend with the coordinator."""

    def __init__(self, options: LinkOptions, backend: Backend) -> None:
        self._options = options
        self._backend = backend
        self._cards = list(backend.models())
        self._instance = secrets.token_hex(8)
        self._metadata: Sequence[tuple[str, str]] = (("authorization", f"Bearer {options.key}"),)
        self._started = False
        self._stopping = False
        self._signalled = False
        self._welcomed = False
        self._wake = asyncio.Event()
        self._stop_requested = asyncio.Event()
        self._silence_limit_s: float | None = None
        self._heartbeat_due = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self._clock = StepClock(0.0)
        self._unsent: deque[worker_pb2.Report] = deque()

    async def run(self) -> None:
        """Serves until it is told to stop (SIGTERM, SIGINT, `stop`, or the coordinator's Drain).

        Raises:
            LinkError: the coordinator refused the key, the models or the call itself.
        """
        failpoints.warn_if_armed(log)
        self._loop = asyncio.get_running_loop()
        options = self._options
        async with open_channel(options.address, options.authorities, client_options()) as channel:
            self._stub: WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
            transfers = GrpcTransfers(self._stub, self._metadata, self._loop)
            self._transfers = transfers
            limits = self._options.limits
            self._executor = Executor(
                self._backend, transfers, self._progress, limits, end_with_stacks
            )
            self._executor.start()
            self._started = True
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._on_signal, number)
            watchdog = Watchdog(self._executor.activity, frozen_limit_s=limits.base_s)
            watchdog.start()
            try:
                await self._serve()
            finally:
                # What is still queued has nobody to report to.
                transfers.close()
                await asyncio.to_thread(self._executor.close)
                watchdog.close()

    def stop(self) -> None:
        """Says goodbye to the coordinator, finishes the operation at hand, then ends; what has not
        begun goes to another worker. Ends all the same when the grace period is over."""
        if self._stopping:
            return
        self._stopping = True
        if self._started:
            self._executor.leave()
            self._loop.call_later(self._options.grace_s, self._give_up)
        self._stop_requested.set()
        self._wake.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping:
            log.warning("%s again: ending at once", number.name)
            os._exit(128 + number)
        log.info("%s: leaving", number.name)
        self.stop()

    def _give_up(self) -> None:
        # The executor's thread cannot be broken off; the coordinator sees the stream end and gives
        # its operation, like all others, to another worker.
        step = self._executor.activity.step
        log.warning(
            "the grace period of %g s is over%s: ending",
            self._options.grace_s,
            f" and {step.operation_id} still runs; it begins anew elsewhere" if step else "",
        )
        os._exit(0)

    def _progress(self) -> None:
        # From the executor's thread. One wake-up serves all news until the loop has seen it.
        if not self._signalled:
            self._signalled = True
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _serve(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping:
            self._connected = False
            try:
                await self._session()
                if self._stopping:
                    return
                log.warning("the coordinator at %s ended the stream", self._options.address)
            except TimeoutError:
                log.warning(
                    "heard nothing from the coordinator at %s in time", self._options.address
                )
            except grpc.aio.AioRpcError as error:
                if error.code() in _FATAL:
                    raise LinkError(
                        f"the coordinator at {self._options.address} refuses this worker: "
                        f"{error.code().name}: {error.details()}"
                    ) from error
                self._check_hung(error)
                await self._check_tls(error)
                log.warning(
                    "%s the coordinator at %s (%s: %s)",
                    "lost" if self._connected else "cannot reach",
                    self._options.address,
                    error.code().name,
                    error.details(),
                )
            if self._stopping:
                return
            if self._connected:
                pause_s = _FIRST_PAUSE_S
            await self._pause(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def _check_tls(self, error: grpc.aio.AioRpcError) -> None:
        """Raises LinkError if this worker and a coordinator it never reached differ about TLS."""
        if self._welcomed or error.code() is not grpc.StatusCode.UNAVAILABLE:
            return
        found = await find_mismatch(self._options.address, self._options.authorities)
        if found is not None:
            raise LinkError(
                f"the server at {self._options.address.host_port} {found.problem}; {found.remedy}"
            ) from error

    def _check_hung(self, error: grpc.aio.AioRpcError) -> None:
        """Ends the process if the coordinator has found that its executor hangs: the watchdog has
        failed, and neither the executor's thread nor anything that it holds will ever be free."""
        try:
            status = rpc_status.from_call(error)
        except ValueError:  # trailers that contradict the call's own code
            return
        if status is not None and from_status(status).reason == "EXECUTOR_HUNG":
            log.critical("the coordinator at %s: %s", self._options.address, error.details())
            end_with_stacks()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop_requested.wait()
        except TimeoutError:
            return

    async def _session(self) -> None:
        """One stream from Register to its end."""
        for card in self._cards:
            await self._stub.PublishModel(
                wire.publish_request(card, self._backend.losses()),
                metadata=self._metadata,
                timeout=_CALL_TIMEOUT_S,
            )
        call = self._stub.Connect(metadata=self._metadata)
        self._executor.new_stream()
        tasks: list[asyncio.Task[None]] = []
        try:
            await call.write(worker_pb2.ConnectRequest(register=self._register()))
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                first = await call.read()
            if not isinstance(first, worker_pb2.ConnectResponse):
                await _raise_status(call)
                return
            self._welcome(first.welcome)
            log.info("connected to %s as %s", self._options.address, first.welcome.worker_id)
            self._connected = self._welcomed = True
            self._silence_limit_s = _seconds(first.welcome.silence_limit) or None
            interval_s = _seconds(first.welcome.heartbeat_interval)
            self._clock = StepClock(2 * interval_s)
            self._beat(interval_s)
            tasks = [
                asyncio.create_task(self._read(call)),
                asyncio.create_task(self._write(call)),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                tasks[0].result()
                await _raise_status(call)
            else:
                tasks[1].result()
                # All is said; the coordinator ends the stream.
                await asyncio.wait(tasks[:1], timeout=_LAST_WORDS_S)
        except asyncio.InvalidStateError:
            await _raise_status(call)
        finally:
            if self._heartbeat is not None:
                self._heartbeat.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Leaving the iteration would not end the call.
            call.cancel()

    def _beat(self, interval_s: float) -> None:
        if interval_s > 0:
            self._heartbeat_due = True
            self._wake.set()
            self._heartbeat = self._loop.call_later(interval_s, self._beat, interval_s)

    def _sign_of_life(self) -> worker_pb2.WorkerHeartbeat:
        step = self._executor.activity.step
        running_s = self._clock.look(step)
        if step is None:
            return worker_pb2.WorkerHeartbeat()
        return worker_pb2.WorkerHeartbeat(
            executing=worker_pb2.Executing(
                operation_id=step.operation_id,
                run_id=step.run_id,
                running=_duration(running_s),
                limit=_duration(step.limit_s),
            )
        )

    def _register(self) -> worker_pb2.Register:
        return worker_pb2.Register(
            name=self._options.name,
            backend=self._backend.name,
            device=self._backend.device,
            models=[card.name for card in self._cards],
            credits=self._backend.credits,
            held_runs=self._executor.held_runs(),
            group_tokens=self._backend.group_tokens,
            sample_tokens=self._backend.sample_tokens,
            fingerprint=self._backend.fingerprint(),
            instance=self._instance,
        )

    def _welcome(self, welcome: worker_pb2.Welcome) -> None:
        self._transfers.worker_id = welcome.worker_id
        policy = welcome.snapshots
        self._executor.snapshots.policy = SnapshotPolicy(
            policy.steps, policy.payload_bytes, policy.replay_s
        )

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        executor = self._executor
        while True:
            async with asyncio.timeout(self._silence_limit_s):
                response = await call.read()
            if not isinstance(response, worker_pb2.ConnectResponse):
                return
            kind = response.WhichOneof("message")
            if kind == "plan":
                executor.submit(response.plan)
            elif kind == "cancel":
                cancel = response.cancel
                executor.cancel(cancel.operation_id, waiting_only=cancel.waiting_only)
            elif kind == "release":
                executor.release(response.release.run_id)
            elif kind == "drain":
                log.info("the coordinator asks this worker to end")
                self.stop()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        said_goodbye = False
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._signalled = False
            if self._stopping and not said_goodbye:
                await call.write(worker_pb2.ConnectRequest(goodbye=worker_pb2.Goodbye()))
                said_goodbye = True
            # Read before collecting: what ends after this wakes the loop once more.
            if self._heartbeat_due:
                self._heartbeat_due = False
                await call.write(worker_pb2.ConnectRequest(heartbeat=self._sign_of_life()))
            finished = said_goodbye and self._executor.idle
            refused = self._executor.collect_refused()
            self._unsent.extend(_reports(*self._executor.collect()))
            if refused:
                self._unsent.append(worker_pb2.Report(refused=refused))
            # Taken after the outcomes and sent before them: an outcome comes behind its tokens.
            # They are not kept for another stream, which gets them from the first on.
            for report in _chunk_reports(self._executor.collect_chunks()):
                await call.write(worker_pb2.ConnectRequest(report=report))
            while self._unsent:
                await call.write(worker_pb2.ConnectRequest(report=self._unsent[0]))
                self._unsent.popleft()
            if finished:
                await call.done_writing()
                return


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _reports(
    started: list[worker_pb2.OperationStarted], done: list[worker_pb2.OperationDone]
) -> list[worker_pb2.Report]:
    """As few reports as message size allows."""
    if not started and not done:
        return []
    report = worker_pb2.Report(started=started)
    reports, size = [report], 0
    for outcome in done:
        size += outcome.ByteSize()
        if size > _REPORT_BYTES and report.done:
            report, size = worker_pb2.Report(), outcome.ByteSize()
            reports.append(report)
        report.done.append(outcome)
    return reports


def _chunk_reports(chunks: Iterable[tuple[int, SampleChunk]]) -> Iterator[worker_pb2.Report]:
    """Streamed tokens in as few reports as message size allows."""
    report, size = worker_pb2.Report(), 0
    for epoch, chunk in chunks:
        report.chunks.append(wire.sample_chunk(epoch, chunk))
        size += report.chunks[-1].ByteSize()
        if size > _REPORT_BYTES:
            yield report
            report, size = worker_pb2.Report(), 0
    if report.chunks:
        yield report


async def _raise_status(call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
    """Raises the call's status unless it is OK."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )
