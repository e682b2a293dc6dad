"""Options that `tensafe up` and `tensafe server` share: where it serves, its limits, its life."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tensafe_server.app import Settings
from tensafe_server.fleet.dispatcher import CompanyPolicy
from tensafe_server.operations.limits import Limits
from tensafe_server.operations.snapshots import RecoveryPolicy
from tensafe_server.tls import Certificate, CertificateError

_DATA = Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "tensafe"


def _checked_address(context: click.Context, option: click.Parameter, value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not (host and separator and port.isascii() and port.isdigit() and int(port) < 65536):
        raise click.BadParameter(f"{value!r} is not HOST:PORT with a port from 0 to 65535")
    return value


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


def _checked_loopback(
    context: click.Context, option: click.Parameter, value: str | None
) -> str | None:
    if value is not None and not _is_loopback(_checked_address(context, option, value)):
        raise click.BadParameter(f"{value!r} is not on loopback, and it serves in plain text")
    return value


_listen = click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:50051",
    show_default=True,
    callback=_checked_address,
    help="Address to serve on; port 0 takes a free one.",
)
_data = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=_DATA,
    show_default=True,
    help="Directory of the store and the artifacts; made if missing.",
)
_tls_cert = click.option(
    "--tls-cert",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Serve with TLS: PEM certificate, with the chain to its authority.",
)
_tls_key = click.option(
    "--tls-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The certificate's private key, PEM, unencrypted.",
)


def _recovery(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `RecoveryPolicy`, and gives the command the policy as `recovery`."""
    default = RecoveryPolicy()

    @functools.wraps(command)
    def with_policy(
        snapshot_replay_s: float,
        snapshot_mib: float,
        snapshot_steps: int,
        snapshots_kept: int,
        result_retention_s: float,
        **options: Any,
    ) -> None:
        policy = RecoveryPolicy(
            snapshot_steps,
            int(snapshot_mib * 2**20),
            snapshot_replay_s,
            snapshots_kept,
            result_retention_s,
        )
        command(recovery=policy, **options)

    for option in (
        click.option(
            "--result-retention-s",
            type=click.FloatRange(min=1.0),
            default=default.result_retention_s,
            show_default=True,
            help="How long per-token outputs and completions are kept after an operation ended.",
        ),
        click.option(
            "--snapshots-kept",
            type=click.IntRange(min=1),
            default=default.snapshots_kept,
            show_default=True,
            help="Snapshots of each run; with one alone, a damaged one has none before it.",
        ),
        click.option(
            "--snapshot-steps",
            type=click.IntRange(min=0),
            default=default.snapshot_steps,
            show_default=True,
            help="Snapshot a run after so many updates; 0: not by this measure.",
        ),
        click.option(
            "--snapshot-mib",
            type=click.FloatRange(min=0.0),
            default=default.snapshot_bytes / 2**20,
            show_default=True,
            help="Snapshot a run after so much logged payload; 0: not by this measure.",
        ),
        click.option(
            "--snapshot-replay-s",
            type=click.FloatRange(min=0.0),
            default=default.snapshot_replay_s,
            show_default=True,
            help="Snapshot a run before a replay after a crash would take longer; 0: not by this "
            "measure.",
        ),
    ):
        with_policy = option(with_policy)
    return with_policy


def _limit(name: str, default: float, what: str, *, whole: bool = True) -> Any:
    kind: Any = click.IntRange(1) if whole else click.FloatRange(0, min_open=True)
    return click.option(name, type=kind, default=default, show_default=True, help=what)


_LIFE = (
    _limit(
        "--grace-s",
        30.0,
        "After SIGTERM: how long ending may take; what runs is finished, calls are answered.",
        whole=False,
    ),
    _limit(
        "--worker-silence-s",
        10.0,
        "A worker that says nothing for so long is taken for dead, and its runs move.",
        whole=False,
    ),
    _limit("--tenant-queue-operations", 20_000, "Most unfinished operations of one tenant."),
    _limit("--tenant-queue-mib", 4096, "Most MiB of what they carry."),
    _limit("--tenant-streams", 1000, "Most token streams that one tenant may have open."),
    _limit("--queue-operations", 100_000, "Most unfinished operations of all tenants together."),
    _limit("--queue-mib", 32_768, "Most MiB of what they carry."),
    _limit(
        "--spec-memory-mib",
        64,
        "Most MiB of it in memory; the rest is read from the store when its turn comes.",
    ),
)

_company_wait_ms = click.option(
    "--company-wait-ms",
    type=click.FloatRange(min=0, max=1000),
    default=1e3 * CompanyPolicy().wait_s,
    show_default=True,
    help="How long a small forward_backward waits, at most, for other runs' to be executed with "
    "it, if its worker has nothing else to do; 0: not at all.",
)


def life(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a coordinator's life: its grace period and its limits."""

    @functools.wraps(command)
    def with_settings(
        listen: str,
        data: Path,
        grace_s: float,
        worker_silence_s: float,
        tenant_queue_operations: int,
        tenant_queue_mib: int,
        tenant_streams: int,
        queue_operations: int,
        queue_mib: int,
        spec_memory_mib: int,
        company_wait_ms: float,
        recovery: RecoveryPolicy,
        tls_cert: Path | None,
        tls_key: Path | None,
        **rest: Any,
    ) -> None:
        limits = Limits(
            tenant_operations=tenant_queue_operations,
            tenant_bytes=tenant_queue_mib * 2**20,
            all_operations=queue_operations,
            all_bytes=queue_mib * 2**20,
            tenant_streams=tenant_streams,
        )
        settings = Settings(
            data=data,
            listen=listen,
            limits=limits,
            recovery=recovery,
            spec_memory_bytes=spec_memory_mib * 2**20,
            worker_silence_s=worker_silence_s,
            company=CompanyPolicy(company_wait_ms / 1e3),
            grace_s=grace_s,
            certificate=_certificate(tls_cert, tls_key),
        )
        command(settings=settings, **rest)

    with_all = _recovery(with_settings)
    for option in (_company_wait_ms, *reversed(_LIFE), _data, _tls_key, _tls_cert, _listen):
        with_all = option(with_all)
    return with_all


def _certificate(tls_cert: Path | None, tls_key: Path | None) -> Certificate | None:
    if tls_cert is None or tls_key is None:
        if tls_cert is not tls_key:
            raise click.UsageError("--tls-cert and --tls-key belong together; give both")
        return None
    try:
        return Certificate.read(tls_cert, tls_key)
    except CertificateError as error:
        raise click.ClickException(str(error)) from error


listen_on_loopback = click.option(
    "--local-listen",
    metavar="HOST:PORT",
    callback=_checked_loopback,
    help="With --tls-cert: loopback address, in plain text, for this machine's own workers and "
    "profile.  [default: 127.0.0.1:50052]",
)
