"""The commands `tensafe up` and `tensafe server`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tensafe.wire.status import TenSafeFault
from tensafe_client.errors import ConfigError
from tensafe_server.app import AddressInUseError, DataDirectoryError, Settings
from tensafe_server.fleet.launcher import WorkerStartError
from tensafe_server.local import LocalSettings, serve, serve_locally
from tensafe_server.options import life, listen_on_loopback
from tensafe_server.store.base import SchemaTooNewError, StoreDamagedError
from tensafe_server.worker_options import given_to_workers

_LOCAL_LISTEN = "127.0.0.1:50052"
_GC_THRESHOLDS = (5_000, 20, 20)


@click.command()
@listen_on_loopback
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
@given_to_workers
@click.option(
    "--profile",
    default="local",
    show_default=True,
    help="Name of the client profile to write; it becomes the default one.",
)
@click.option("--no-profile", is_flag=True, help="Write no profile.")
@life
def up(
    settings: Settings,
    local_listen: str | None,
    backend: str,
    models: tuple[str, ...],
    workers: int | None,
    device: str,
    dtype: str,
    worker_options: list[str],
    profile: str,
    no_profile: bool,
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
    if backend == "mock" and (device not in ("auto", "cpu") or dtype != "auto"):
        raise click.UsageError("the mock backend computes nothing; leave --device and --dtype out")
    if local_listen is not None and settings.certificate is None:
        raise click.UsageError("--local-listen is for --tls-cert; without it --listen serves both")
    settings = replace(settings, local_listen=local_listen or _LOCAL_LISTEN)
    arguments = _worker_arguments(backend, models or ("smollm2-135m",), workers, device, dtype)
    arguments = [[*one, *worker_options] for one in arguments]
    local = LocalSettings(settings, arguments, None if no_profile else profile)
    _run(serve_locally(local, _announce, _tell_secret))


@click.command()
@life
def server(settings: Settings) -> None:
    """Run a coordinator alone; workers dial in with `tensafe worker`.

    The first start makes an admin key and prints it once on stderr. SIGTERM or Ctrl-C: it refuses
    what is new, keeps what it accepted, sends its workers and clients away to come back, and ends
    with 0 within --grace-s; a second one ends it at once.
    """
    _run(serve(settings, _announce, _tell_secret))


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
    # What was imported stays, and nearly all that comes is freed without the collector.
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
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
        ConfigError,
    ) as error:
        raise click.ClickException(str(error)) from error
