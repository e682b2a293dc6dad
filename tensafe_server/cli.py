"""The commands `tensafe up` and `tensafe server`."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tensafe.wire.status import TenSafeFault
from tensafe_server.app import AddressInUseError, DataDirectoryError, Settings
from tensafe_server.fleet.launcher import WorkerStartError
from tensafe_server.local import LocalSettings, serve, serve_locally
from tensafe_server.operations.limits import Limits
from tensafe_server.operations.snapshots import RecoveryPolicy
from tensafe_server.store.base import SchemaTooNewError, StoreDamagedError
from tensafe_server.tls import Certificate, CertificateError

_DATA = Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "tensafe"

_LOCAL_LISTEN = "127.0.0.1:50052"


def _checked_address(context: click.Context, option: click.Parameter, value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not (host and separator and port.isascii() and port.isdigit() and int(port) < 65536):
        raise click.BadParameter(f"{value!r} is not HOST:PORT with a port from 0 to 65535")
    return value


def _checked_loopback(
    context: click.Context, option: click.Parameter, value: str | None
) -> str | None:
    if value is not None and not _checked_address(context, option, value).startswith("127."):
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
    _limit("--queue-operations", 100_000, "Most unfinished operations of all tenants together."),
    _limit("--queue-mib", 32_768, "Most MiB of what they carry."),
    _limit(
        "--spec-memory-mib",
        64,
        "Most MiB of it in memory; the rest is read from the store when its turn comes.",
    ),
)


def _life(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a coordinator's life: its grace period and its limits."""

    @functools.wraps(command)
    def with_settings(
        listen: str,
        tls_cert: Path | None,
        tls_key: Path | None,
        data: Path,
        grace_s: float,
        worker_silence_s: float,
        tenant_queue_operations: int,
        tenant_queue_mib: int,
        queue_operations: int,
        queue_mib: int,
        spec_memory_mib: int,
        recovery: RecoveryPolicy,
        **rest: Any,
    ) -> None:
        limits = Limits(
            tenant_operations=tenant_queue_operations,
            tenant_bytes=tenant_queue_mib * 2**20,
            all_operations=queue_operations,
            all_bytes=queue_mib * 2**20,
        )
        settings = Settings(
            data=data,
            listen=listen,
            certificate=_certificate(tls_cert, tls_key),
            limits=limits,
            recovery=recovery,
            spec_memory_bytes=spec_memory_mib * 2**20,
            worker_silence_s=worker_silence_s,
            grace_s=grace_s,
        )
        command(settings=settings, **rest)

    with_all = _recovery(with_settings)
    for option in (*reversed(_LIFE), _data, _tls_key, _tls_cert, _listen):
        with_all = option(with_all)
    return with_all


@click.command()
@click.option(
    "--local-listen",
    metavar="HOST:PORT",
    callback=_checked_loopback,
    help="With --tls-cert: loopback address, in plain text, for this machine's own workers and "
    "profile.  [default: 127.0.0.1:50052]",
)
@click.option(
    "--backend",
    type=click.Choice(["torch", "mock"]),
    default="torch",
    show_default=True,
    help="`mock` trains nothing and takes any model name.",
)
@click.option(
    "--model",
    "models",
    metavar="REF",
    multiple=True,
    help="A model to register: the alias smollm2-135m, a local directory, a hub id, or NAME=one of "
    "these. Repeatable.  [default: smollm2-135m]",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Worker processes.  [default: one for each GPU; one on a machine without]",
)
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda:N, for every worker."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the frozen base model.",
)
@click.option(
    "--profile",
    default="local",
    show_default=True,
    help="Name of the client profile to write; it becomes the default one.",
)
@click.option("--no-profile", is_flag=True, help="Write no profile.")
@click.option(
    "--operation-limit-s",
    type=click.FloatRange(0, min_open=True),
    help="Given to every worker: see `tensafe worker --help`.",
)
@_life
def up(
    settings: Settings,
    local_listen: str | None,
    backend: str,
    models: tuple[str, ...],
    workers: int | None,
    device: str,
    dtype: str,
    profile: str,
    no_profile: bool,
    operation_limit_s: float | None,
) -> None:
    """Run the whole service on this machine: a coordinator and its workers.

    Prints `ready: grpc://HOST:PORT` when it serves, after writing a client profile, so that
    `tensafe` commands and `ServiceClient()` find it by themselves. SIGTERM or Ctrl-C: what runs is
    finished, all that was accepted is kept for the next start, and it ends with 0 within --grace-s;
    a second one ends it at once.

    \b
    Examples:
      tensafe up --model smollm2-135m
      tensafe up --backend mock --listen 127.0.0.1:0
      tensafe up --model mine=/models/mine --workers 2 --data /var/lib/tensafe
      tensafe up --listen 0.0.0.0:50051 --tls-cert cert.pem --tls-key key.pem
    """
    if backend == "mock" and models:
        raise click.UsageError("the mock backend takes any model name; leave --model out")
    if local_listen is not None and settings.certificate is None:
        raise click.UsageError("--local-listen is for --tls-cert; without it --listen serves both")
    settings = replace(settings, local_listen=local_listen or _LOCAL_LISTEN)
    arguments = _worker_arguments(backend, models or ("smollm2-135m",), workers, device, dtype)
    if operation_limit_s is not None:
        arguments = [[*one, "--operation-limit-s", str(operation_limit_s)] for one in arguments]
    local = LocalSettings(settings, arguments, None if no_profile else profile)
    _run(serve_locally(local, _announce))


@click.command()
@_life
def server(settings: Settings) -> None:
    """Run a coordinator alone; workers dial in with `tensafe worker`.

    The first start makes an admin key and prints it once on stderr. SIGTERM or Ctrl-C: it refuses
    what is new, keeps what it accepted, sends its workers and clients away to come back, and ends
    with 0 within --grace-s; a second one ends it at once.
    """
    _run(serve(settings, _announce, _tell_secret))


def _certificate(tls_cert: Path | None, tls_key: Path | None) -> Certificate | None:
    if tls_cert is None or tls_key is None:
        if tls_cert is not tls_key:
            raise click.UsageError("--tls-cert and --tls-key belong together; give both")
        return None
    try:
        return Certificate.read(tls_cert, tls_key)
    except CertificateError as error:
        raise click.ClickException(str(error)) from error


def _worker_arguments(
    backend: str, models: tuple[str, ...], workers: int | None, device: str, dtype: str
) -> list[list[str]]:
    if backend == "mock":
        return [["--backend", "mock"] for _ in range(workers or 1)]
    gpus = _gpu_count() if device == "auto" else 0
    count = workers or max(1, gpus)
    shared = ["--backend", "torch", "--dtype", dtype, "--share", str(count)]
    for model in models:
        shared += ["--model", model]
    devices = [f"cuda:{number % gpus}" if gpus else device for number in range(count)]
    return [[*shared, "--device", name] for name in devices]


def _gpu_count() -> int:
    """NVIDIA devices of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _announce(address: str) -> None:
    click.echo(f"ready: {address}")


def _tell_secret(secret: str) -> None:
    click.echo(f"admin key, shown only now: {secret}", err=True)


def _run(main: Coroutine[Any, Any, None]) -> None:
    logging.basicConfig(
        level=os.environ.get("TENSAFE_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    try:
        with runner:
            runner.run(main)
    except (
        WorkerStartError,
        AddressInUseError,
        DataDirectoryError,
        SchemaTooNewError,
        StoreDamagedError,
        TenSafeFault,
    ) as error:
        raise click.ClickException(str(error)) from error
