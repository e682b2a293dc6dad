"""The commands `tensafe up` and `tensafe server`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tensafe.wire.status import TenSafeFault
from tensafe_server.app import AddressInUseError, DataDirectoryError, Settings
from tensafe_server.fleet.launcher import WorkerStartError
from tensafe_server.local import LocalSettings, serve, serve_locally
from tensafe_server.operations.snapshots import RecoveryPolicy
from tensafe_server.store.base import SchemaTooNewError, StoreDamagedError

_DATA = Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "tensafe"


def _checked_address(context: click.Context, option: click.Parameter, value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not (host and separator and port.isascii() and port.isdigit() and int(port) < 65536):
        raise click.BadParameter(f"{value!r} is not HOST:PORT with a port from 0 to 65535")
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


def _recovery(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `RecoveryPolicy`, and gives the command the policy as `recovery`."""
    default = RecoveryPolicy()

    @wraps(command)
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


@click.command()
@_listen
@_data
@_recovery
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
def up(
    listen: str,
    data: Path,
    backend: str,
    models: tuple[str, ...],
    workers: int | None,
    device: str,
    dtype: str,
    profile: str,
    no_profile: bool,
    recovery: RecoveryPolicy,
) -> None:
    """Run the whole service on this machine: a coordinator and its workers.

    Prints `ready: grpc://HOST:PORT` when it serves, after writing a client profile, so that
    `tensafe` commands and `ServiceClient()` find it by themselves. SIGTERM or Ctrl-C ends it.

    \b
    Examples:
      tensafe up --model smollm2-135m
      tensafe up --backend mock --listen 127.0.0.1:0
      tensafe up --model mine=/models/mine --workers 2 --data /var/lib/tensafe
    """
    if backend == "mock" and models:
        raise click.UsageError("the mock backend takes any model name; leave --model out")
    settings = LocalSettings(
        Settings(data=data, listen=listen, recovery=recovery),
        _worker_arguments(backend, models or ("smollm2-135m",), workers, device, dtype),
        None if no_profile else profile,
    )
    _run(serve_locally(settings, _announce))


@click.command()
@_listen
@_data
@_recovery
def server(listen: str, data: Path, recovery: RecoveryPolicy) -> None:
    """Run a coordinator alone; workers dial in with `tensafe worker`.

    The first start makes an admin key and prints it once on stderr.
    """
    _run(serve(Settings(data=data, listen=listen, recovery=recovery), _announce, _tell_secret))


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
