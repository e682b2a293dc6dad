"""Everything on one machine: a coordinator, its workers, a key and a profile to use them with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tensafe.v1 import admin_pb2 as admin
from tensafe_client.profiles import read_profiles, save_profile
from tensafe_server.app import Coordinator, Settings
from tensafe_server.fleet.launcher import LocalLauncher, WorkerSpec
from tensafe_server.tenants.identity import Identity

log = logging.getLogger(__name__)

_LOCAL_TENANT = "local"
# Of the grace period: what workers may take to finish, and after which they are killed. The rest is
# the coordinator's own.
_WORKERS_SHARE = 0.7
_KILL_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What `tensafe up` starts.

    Attributes:
        worker_arguments: for each worker to start its arguments, but for name and connection.
        profile: name of the profile to write; None for none.
    """

    coordinator: Settings
    worker_arguments: Sequence[Sequence[str]]
    profile: str | None


async def serve(
    settings: Settings, announce: Callable[[str], None], tell_secret: Callable[[str], None]
) -> None:
    """Runs a coordinator alone until SIGTERM or SIGINT.

    `tell_secret` is called with a new admin key if the store has none.
    """
    coordinator = await Coordinator.start(settings)
    try:
        await _first_admin_key(coordinator.identity, tell_secret)
        announce(coordinator.address)
        await _until_stopped(coordinator.failed)
    finally:
        await coordinator.stop()


async def _first_admin_key(identity: Identity, tell_secret: Callable[[str], None]) -> None:
    usable = (key for key in identity.keys(None) if key.revoked_ns is None)
    if not any(key.kind == admin.KEY_KIND_ADMIN for key in usable):
        _, secret = await identity.create_key(admin.KEY_KIND_ADMIN, None, "first admin key")
        tell_secret(secret)


async def serve_locally(
    settings: LocalSettings, announce: Callable[[str], None], tell_secret: Callable[[str], None]
) -> None:
    """Runs a coordinator with its workers until SIGTERM or SIGINT.

    `announce` is called with the address once every worker serves; `tell_secret` with a new admin
    key if no profile is written and the store has none.

    Raises:
        WorkerStartError: if a worker ends before it has served.
    """
    grace_s = settings.coordinator.grace_s
    coordinator = await Coordinator.start(settings.coordinator)
    launcher = LocalLauncher()
    try:
        key = coordinator.identity.passing_key(admin.KEY_KIND_WORKER)
        for number, arguments in enumerate(settings.worker_arguments):
            name = f"worker-{number}"
            connect = ["--connect", coordinator.local_address, "--name", name]
            connect += ["--grace-s", str(_WORKERS_SHARE * grace_s)]
            launcher.start(WorkerSpec(name, [*connect, *arguments], key))
        arrived = coordinator.dispatcher.wait_for(len(settings.worker_arguments))
        if await _until_stopped(arrived, launcher.failed, coordinator.failed):
            return
        launcher.served.update(link.name for link in coordinator.dispatcher.links)
        if settings.profile is not None:
            # With TLS too: the certificate need not be made out to this machine's loopback.
            await _write_profiles(coordinator.identity, coordinator.local_address, settings.profile)
        else:
            await _first_admin_key(coordinator.identity, tell_secret)
        announce(coordinator.address)
        await _until_stopped(launcher.failed, coordinator.failed)
    finally:
        await coordinator.drain()
        await launcher.stop(_KILL_SHARE * grace_s)
        await coordinator.stop((1 - _KILL_SHARE) * grace_s)


async def _write_profiles(identity: Identity, address: str, profile: str) -> None:
    tenants = {tenant.name: tenant for tenant in identity.tenants()}
    tenant = tenants.get(_LOCAL_TENANT) or await identity.create_tenant(_LOCAL_TENANT)
    for name, kind, owner in (
        (profile, admin.KEY_KIND_TENANT, tenant.id),
        (f"{profile}-admin", admin.KEY_KIND_ADMIN, None),
    ):
        known = read_profiles().profiles.get(name)
        secret = known.api_key if known is not None else None
        principal = identity.authenticate(secret) if secret else None
        if principal is None or principal.kind != kind:
            _, secret = await identity.create_key(kind, owner, f"profile {name}")
        save_profile(name, address, secret, make_default=name == profile)


async def _until_stopped(*ends: Awaitable[None]) -> bool:
    """Waits for a signal or for one of `ends`; returns whether it was a signal.

    The next signal after it ends the process at once, with 128 + its number.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop(number: signal.Signals) -> None:
        if stopped.is_set():
            log.warning("%s again: ending at once", number.name)
            os._exit(128 + number)
        log.info("%s: ending; what was accepted is kept", number.name)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    waiting = asyncio.ensure_future(stopped.wait())
    futures = [asyncio.ensure_future(end) for end in ends]
    try:
        done, _ = await asyncio.wait([waiting, *futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            waiting.cancel()
    for future in futures:
        if future in done:
            future.result()
    return stopped.is_set()
