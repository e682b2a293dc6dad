"""Composes the coordinator; the only place that knows all of its parts."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tensafe import failpoints
from tensafe.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    artifacts_pb2,
    artifacts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    privacy_pb2,
    privacy_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tensafe.wire.channel import server_options
from tensafe_server.api.admin import AdminServicer
from tensafe_server.api.artifacts import ArtifactsServicer
from tensafe_server.api.datasets import DatasetsServicer
from tensafe_server.api.guard import Guard
from tensafe_server.api.metrics import MetricsServicer
from tensafe_server.api.models import ModelsServicer
from tensafe_server.api.operations import OperationsServicer
from tensafe_server.api.privacy import PrivacyServicer
from tensafe_server.api.registering import GenericHandlers
from tensafe_server.api.submit_streams import RequestStreams
from tensafe_server.api.training import TrainingServicer
from tensafe_server.api.worker import WorkerServicer
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.events.hub import EventHub
from tensafe_server.fleet.blame import Blame
from tensafe_server.fleet.cancel import Cancellation
from tensafe_server.fleet.dispatcher import CompanyPolicy, Dispatcher
from tensafe_server.fleet.liveness import Liveness
from tensafe_server.fleet.reception import Reception
from tensafe_server.fleet.replay import Comparer, ReplayWatch
from tensafe_server.fleet.restore import Restorer
from tensafe_server.fleet.verify import Verifications
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.artifacts import ArtifactBook
from tensafe_server.operations.gaps import GapWatch
from tensafe_server.operations.intake import Intake
from tensafe_server.operations.ledger import SPEC_MEMORY_BYTES, Ledger
from tensafe_server.operations.limits import Limits
from tensafe_server.operations.lookup import OperationReader, draining
from tensafe_server.operations.outcomes import Outcomes
from tensafe_server.operations.pruning import Pruner
from tensafe_server.operations.recovery import recover
from tensafe_server.operations.runs import RunBook
from tensafe_server.operations.snapshots import RecoveryPolicy, SnapshotBook
from tensafe_server.operations.specs import SpecReader
from tensafe_server.operations.streaming import SampleStreams
from tensafe_server.privacy.parts import PrivacyParts
from tensafe_server.store.sqlite import SqliteStore
from tensafe_server.tenants.identity import Identity
from tensafe_server.tls import Certificate
from tensafe_server.uploads.desk import UploadDesk

log = logging.getLogger(__name__)

_SERVICES = [
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (admin_pb2, "AdminService"),
        (artifacts_pb2, "ArtifactsService"),
        (datasets_pb2, "DatasetsService"),
        (metrics_pb2, "MetricsService"),
        (models_pb2, "ModelsService"),
        (operations_pb2, "OperationsService"),
        (privacy_pb2, "PrivacyService"),
        (training_pb2, "TrainingService"),
        (worker_pb2, "WorkerService"),
    )
]


# What is listened on at every address of this machine is at loopback too.
_EVERY_HOST = frozenset({"0.0.0.0", "[::]", "*"})  # noqa: S104  (nothing is bound here)


class AddressInUseError(RuntimeError):
    """The address to listen on is taken or not ours."""


class DataDirectoryError(RuntimeError):
    """The data directory is in use by another coordinator, or cannot be used."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a coordinator.

    Attributes:
        data: directory of the store and the blobs; made if missing.
        listen: HOST:PORT; port 0 takes a free one.
        limits: how much may wait.
        recovery: when snapshots are made, and what is kept.
        gap_timeout_s: how long operations wait for a missing seq.
        certificate: serve `listen` with TLS. None: in plain text.
        local_listen: with a certificate, a plain-text loopback HOST:PORT beside it, for this
            machine's own workers.
        spec_memory_bytes: what waiting operations carry is held in memory up to here, and read from
            the store beyond.
        worker_silence_s: a worker that says nothing for so long is taken for dead.
        company: how long small operations wait for others to be executed with.
        grace_s: how long ending may take: what runs is finished, calls are answered.
    """

    data: Path
    listen: str = "127.0.0.1:50051"
    limits: Limits = field(default_factory=Limits)
    recovery: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    gap_timeout_s: float = 60.0
    certificate: Certificate | None = None
    local_listen: str | None = None
    spec_memory_bytes: int = SPEC_MEMORY_BYTES
    worker_silence_s: float = 10.0
    company: CompanyPolicy = field(default_factory=CompanyPolicy)
    grace_s: float = 30.0


class Coordinator:
    """A running coordinator.

    Attributes:
        identity: its tenants and keys.
        dispatcher: its workers.
        address: where it serves, for clients.
        local_address: where this machine's own workers and profile find it, always in plain text.
        failed: resolves with the error that makes it impossible to go on.
    """

    def __init__(self, settings: Settings, store: SqliteStore) -> None:
        self._settings = settings
        self._store = store
        blobs = LocalBlobStore(settings.data / "blobs")
        payloads = Payloads(blobs)
        self.identity = Identity(store)
        self._models = ModelRegistry(store, blobs)
        self._ledger = Ledger(settings.spec_memory_bytes)
        self._payloads = payloads
        self._hub = EventHub(store, payloads)
        recovery = settings.recovery
        snapshots = SnapshotBook(store, blobs, self._ledger, recovery.snapshots_kept)
        privacy = self._privacy = PrivacyParts(store, blobs, payloads, self._ledger, snapshots)
        outcomes = Outcomes(store, self._ledger, self._hub, payloads, privacy.outcomes)
        self._pruner = Pruner(
            store, blobs, payloads, self._ledger, snapshots, recovery.result_retention_s
        )
        snapshots.on_kept = self._pruner.look_at
        restorer = Restorer(store, payloads, snapshots, privacy.steps)
        specs = self._specs = SpecReader(store, payloads, self._ledger)
        self._blame = Blame(store, self._ledger)
        self.dispatcher = Dispatcher(
            store,
            self._ledger,
            restorer,
            specs,
            settings.company,
            self._blame,
            privacy.steps,
        )
        gaps = GapWatch(store, self._ledger, self._hub, outcomes, settings.gap_timeout_s)
        cancellation = Cancellation(store, self._ledger, outcomes, self.dispatcher)
        reader = self._reader = OperationReader(store, self._ledger, payloads)
        self._streams = SampleStreams(reader, settings.limits.tenant_streams)
        self._artifacts = ArtifactBook(store, self._ledger, blobs)
        self._uploads = UploadDesk(store, blobs, self._models, self._artifacts)
        intake = self._intake = Intake(
            store,
            self._ledger,
            self._models,
            payloads,
            self._hub,
            self._artifacts,
            settings.limits,
            privacy.configs,
        )
        comparer = Comparer(store, payloads)
        verifications = Verifications(self.dispatcher, restorer, comparer, self._pruner.look_at)
        reception = Reception(
            self._ledger,
            self._models,
            outcomes,
            self.dispatcher,
            restorer,
            ReplayWatch(store, self._ledger, comparer, snapshots),
            verifications,
            recovery,
            Liveness(settings.worker_silence_s),
            self._blame,
        )
        runs = RunBook(store, self._ledger, self._models, privacy.configs)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        privacy.steps.on_ready = self.dispatcher.kick
        privacy.steps.on_refused = cancellation.refuse
        reception.on_begun = cancellation.end_deadlines
        self._cancellation = cancellation
        self._connect(outcomes, gaps, cancellation, specs)

        self.address = self.local_address = ""
        self._lock: IO[bytes] | None = None
        self._submitting = RequestStreams(self.identity)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[Guard(self.identity)], options=server_options()
        )
        server = GenericHandlers(self._server)
        services: list[tuple[Any, Any]] = [
            (
                training_pb2_grpc.add_TrainingServiceServicer_to_server,
                TrainingServicer(
                    runs,
                    self._ledger,
                    intake,
                    reader,
                    gaps,
                    cancellation,
                    self.dispatcher,
                    self._hub,
                    verifications,
                    self._pruner,
                    self._submitting,
                ),
            ),
            (
                operations_pb2_grpc.add_OperationsServiceServicer_to_server,
                OperationsServicer(
                    store, self._ledger, reader, cancellation, self._hub, self._streams
                ),
            ),
            (
                metrics_pb2_grpc.add_MetricsServiceServicer_to_server,
                MetricsServicer(self._ledger, self._hub),
            ),
            (
                artifacts_pb2_grpc.add_ArtifactsServiceServicer_to_server,
                ArtifactsServicer(store, self._ledger, blobs, self._artifacts, self._uploads),
            ),
            (
                models_pb2_grpc.add_ModelsServiceServicer_to_server,
                ModelsServicer(self._models, blobs),
            ),
            (
                admin_pb2_grpc.add_AdminServiceServicer_to_server,
                AdminServicer(
                    store, self.identity, self._ledger, runs, blobs, snapshots, verifications
                ),
            ),
            (
                worker_pb2_grpc.add_WorkerServiceServicer_to_server,
                WorkerServicer(store, blobs, self._models, reception, snapshots, privacy.draws),
            ),
            (
                datasets_pb2_grpc.add_DatasetsServiceServicer_to_server,
                DatasetsServicer(privacy.datasets),
            ),
            (
                privacy_pb2_grpc.add_PrivacyServiceServicer_to_server,
                PrivacyServicer(self._ledger, privacy.reports),
            ),
            (health_pb2_grpc.add_HealthServicer_to_server, self._health),
        ]
        for add, servicer in services:
            add(servicer, server)
        reflection.enable_server_reflection(
            [*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )

    def _connect(
        self, outcomes: Outcomes, gaps: GapWatch, cancellation: Cancellation, specs: SpecReader
    ) -> None:
        """Who hears of what."""
        self._ledger.on_ready = self.dispatcher.kick
        self._ledger.on_gap = gaps.update
        self._ledger.on_disputed = self.dispatcher.dispute
        self._ledger.on_over = self.dispatcher.release
        self._ledger.on_deadline = cancellation.watch_deadline
        self.dispatcher.on_unrestorable = cancellation.fail_waiting
        specs.on_read = self.dispatcher.kick
        specs.on_missing = cancellation.give_up
        outcomes.on_lost_store = self._fail
        outcomes.on_saved = self._artifacts.news

    @classmethod
    async def start(cls, settings: Settings) -> Coordinator:
        """Opens the store, recovers what is unfinished, and serves.

        Raises:
            SchemaTooNewError: if a newer version wrote the store.
            DataDirectoryError: if another coordinator uses the directory, or nobody can.
            AddressInUseError: if it cannot listen.
        """
        failpoints.warn_if_armed(log)
        lock = _lock(settings.data)
        path = settings.data / "tensafe.db"
        try:
            store = await SqliteStore.open(path)
        except sqlite3.Error as error:
            raise DataDirectoryError(f"cannot open the store {path}: {_explain(error)}") from error
        coordinator = cls(settings, store)
        coordinator._lock = lock
        try:
            await coordinator._load()
            await coordinator._listen()
        except BaseException:
            coordinator._artifacts.stop()
            coordinator._uploads.stop()
            await store.close()
            raise
        return coordinator

    async def _load(self) -> None:
        await self.identity.load()
        await self._models.load()
        await self._hub.load()
        await self._pruner.sweep()
        pending = await recover(
            self._store, self._payloads, self._models, self._ledger, self._specs.on_missing
        )
        await self._blame.load()
        await self._privacy.load()
        self._cancellation.cancel_deleted()
        self._artifacts.start()
        self._uploads.start()
        log.info("%d runs, %d unfinished operations", len(self._ledger.runs), pending)

    async def _listen(self) -> None:
        listen, certificate = self._settings.listen, self._settings.certificate
        self.address = self._add_port(listen, "--listen", certificate)
        if certificate is None:
            host, _, port = self.address.removeprefix("grpc://").rpartition(":")
            self.local_address = f"grpc://{'127.0.0.1' if host in _EVERY_HOST else host}:{port}"
        elif self._settings.local_listen is not None:
            self.local_address = self._add_port(self._settings.local_listen, "--local-listen", None)
        await self._server.start()
        self._pruner.start()
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _add_port(self, listen: str, option: str, certificate: Certificate | None) -> str:
        try:
            if certificate is None:
                scheme, port = "grpc", self._server.add_insecure_port(listen)
            else:
                credentials = certificate.credentials()
                scheme, port = "grpcs", self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise AddressInUseError(
                f"cannot listen on {listen}: the address is in use or not this machine's; "
                f"choose another with {option}, or port 0 for a free one"
            ) from error
        return f"{scheme}://{listen.rpartition(':')[0]}:{port}"

    async def drain(self) -> None:
        """Accepts no more operations and sends none out, and says so to load balancers and callers;
        other calls are still answered."""
        self._intake.draining = draining()
        await self._health.enter_graceful_shutdown()
        for link in self.dispatcher.links:
            link.draining = True

    async def stop(self, grace_s: float | None = None) -> None:
        """Ends, within `grace_s` seconds (unset: the settings'): watchers, waiters and workers are
        told to come back, and everything accepted is on disk."""
        await self.drain()
        self._hub.close(draining())
        self._reader.drain()
        self._streams.close()
        self._submitting.close(draining())
        self._artifacts.stop()
        self._uploads.stop()
        for link in self.dispatcher.links:
            link.close(draining())
        await self._server.stop(self._settings.grace_s if grace_s is None else grace_s)
        await self._pruner.stop()
        self._privacy.close()
        await self._store.close()
        if self._lock is not None:
            self._lock.close()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _explain(error: sqlite3.Error) -> str:
    code = error.sqlite_errorcode & 0xFF
    remedy = {
        sqlite3.SQLITE_BUSY: "end the other process that uses it, and start again",
        sqlite3.SQLITE_FULL: "free space on its disk, and start again",
        sqlite3.SQLITE_READONLY: "make it writable, and start again",
        sqlite3.SQLITE_NOTADB: "restore it from a backup",
        sqlite3.SQLITE_CORRUPT: "restore it from a backup",
    }.get(code, "look at its disk and its permissions")
    return f"{error}; {remedy}"


def _lock(data: Path) -> IO[bytes]:
    """Takes the data directory for this process; the lock ends with the file, or with us."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (data / "lock").open("ab")
    except OSError as error:
        raise DataDirectoryError(
            f"cannot use {data} as data directory: {error.strerror}; choose another with --data"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataDirectoryError(
            f"another coordinator is using {data}; stop it, or choose another with --data"
        ) from error
    return file
