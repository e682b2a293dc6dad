"""`tensafe worker`: one process for one device."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tensafe.wire.tls import Address, parse_address, read_authorities
from workers.allocator import restart_suited
from workers.threads import pick_threads

if TYPE_CHECKING:
    from workers.backend import Backend

KEY_VARIABLE = "TENSAFE_WORKER_KEY"


@click.command(name="worker", context_settings={"show_default": True})
@click.option(
    "--connect",
    required=True,
    metavar="HOST:PORT",
    help="The coordinator's address; grpcs://HOST:PORT where it serves with TLS.",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="TENSAFE_CA",
    show_envvar=True,
    help="PEM file of the authority that signed the coordinator's certificate.  "
    "[default: the well-known ones]",
)
@click.option(
    "--backend",
    type=click.Choice(["torch", "mock"]),
    default="torch",
    help="torch trains real models; mock serves any model name and trains nothing.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]REF",
    help="A model to serve: smollm2-135m, a local directory, or a hub id. Repeat it for several.",
)
@click.option("--device", default="auto", help="auto, cpu or cuda:N.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    help="Element type of the frozen weights; auto takes bfloat16 where the device has it.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; picked by itself if not given."
)
@click.option(
    "--share",
    type=click.IntRange(min=1),
    default=1,
    help="How many workers share this machine's cores.",
)
@click.option(
    "--group-tokens",
    type=click.IntRange(min=0),
    help="Most tokens to execute together for several runs; 0: one run at a time.  "
    "[default: what gains on the device; 0 for mock]",
)
@click.option(
    "--pass-tokens",
    type=click.IntRange(min=1),
    help="Most tokens that go through a model at once; a larger batch is cut. Deterministic runs "
    "have a fixed number.  [default: measured at the start]",
)
@click.option(
    "--run-memory-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory of runs' adapters and optimizers beyond which idle ones wait on disk; what is not "
    "idle may take half as much again.  [default: a third of what is free at the start]",
)
@click.option(
    "--sample-memory-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="Most memory of the rows that are sampled, all models together: keys and values, and "
    "the adapters beside them. What does not fit yet waits.  "
    "[default: an eighth of what is free at the start]",
)
@click.option(
    "--loss",
    "plug_ins",
    multiple=True,
    metavar="NAME[=MODULE:FUNCTION]",
    help="A loss of your own to offer beside the built-in ones: a function that "
    "workers.losses.loss decorates, or the name of an entry point in the group tensafe.losses. "
    "Repeat it for several. Workers of one model need the same.",
)
@click.option(
    "--compile",
    "compiling",
    type=click.Choice(["auto", "first", "off"]),
    default="auto",
    show_default=True,
    help="torch.compile of the element-wise kernels, before the worker registers: first, or it "
    "does not start, or never; auto is off on a CPU, and on a GPU goes on without if that does not "
    "go. Deterministic runs never use them.",
)
@click.option(
    "--cuda-graphs",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="auto: a GPU captures passes of sizes that come again and replays them, which takes it "
    "up to an eighth of its memory. Deterministic runs have other bits with off.",
)
@click.option("--name", help="For people and logs.  [default: HOST/PID]")
@click.option(
    "--operation-limit-s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    help="An operation that runs longer than this, and --token-limit-ms for each of its tokens, "
    "hangs: the process ends itself with status 75, and its runs go on elsewhere.",
)
@click.option(
    "--token-limit-ms",
    type=click.FloatRange(min=0),
    default=50.0,
    help="See --operation-limit-s.",
)
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    help="After SIGTERM: how long the operation at hand may take before the process ends without "
    "it. What has not begun goes to another worker at once.",
)
@click.option(
    "--follow-stdin",
    is_flag=True,
    help="End as on SIGTERM when standard input closes: for whoever starts workers as children.",
)
def worker(
    connect: str,
    ca: Path | None,
    backend: str,
    models: tuple[str, ...],
    device: str,
    dtype: str,
    threads: int | None,
    share: int,
    group_tokens: int | None,
    pass_tokens: int | None,
    run_memory_mib: float | None,
    sample_memory_mib: float | None,
    plug_ins: tuple[str, ...],
    compiling: str,
    cuda_graphs: str,
    name: str | None,
    operation_limit_s: float,
    token_limit_ms: float,
    grace_s: float,
    follow_stdin: bool,
) -> None:
    """Run a worker: it dials in to the coordinator, registers its models and executes.

    The worker key is read from the environment variable TENSAFE_WORKER_KEY. SIGTERM or Ctrl-C: it
    finishes the operation at hand and leaves with status 0; a second one ends it at once.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise click.ClickException(
            f"{KEY_VARIABLE} is not set; make a key with "
            "`tensafe admin keys create --kind worker` and export it"
        )
    if backend == "mock" and (models or dtype != "auto" or device not in ("auto", "cpu")):
        raise click.UsageError(
            "the mock backend serves any model on the cpu; leave out --model, --dtype and --device"
        )
    sizes = pass_tokens or run_memory_mib or sample_memory_mib
    if backend == "mock" and (sizes or plug_ins or compiling != "auto" or cuda_graphs != "auto"):
        raise click.UsageError(
            "the mock backend computes nothing; leave out --pass-tokens, --run-memory-mib, "
            "--sample-memory-mib, --loss, --compile and --cuda-graphs"
        )
    if backend == "torch" and not models:
        raise click.UsageError("the torch backend needs at least one --model")
    address, authorities = _coordinator(connect, ca)
    if backend == "torch":
        restart_suited()
    chosen = threads or pick_threads(share)
    # Before torch is imported: spinning OpenMP threads starve their neighbours.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(chosen)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from workers.link import Link, LinkError, LinkOptions
    from workers.watchdog import OperationLimits

    options = LinkOptions(
        address=address,
        authorities=authorities,
        key=key,
        name=name or f"{socket.gethostname()}/{os.getpid()}",
        grace_s=grace_s,
        limits=OperationLimits(operation_limit_s, token_limit_ms),
    )
    try:
        if follow_stdin:
            threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
        loaded = _backend(
            backend,
            models,
            device,
            dtype,
            chosen,
            pass_tokens,
            _bytes(run_memory_mib),
            _bytes(sample_memory_mib),
            plug_ins,
            compiling,
            cuda_graphs,
        )
        if group_tokens is not None:
            loaded.group_tokens = group_tokens
        link = Link(options, loaded)
        # What was loaded stays for ever; the collector need not walk over it again and again.
        gc.collect()
        gc.freeze()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(link.run())
    except LinkError as error:
        raise click.ClickException(str(error)) from error


def _bytes(mib: float | None) -> int | None:
    return None if mib is None else int(mib * 2**20)


def _coordinator(connect: str, ca: Path | None) -> tuple[Address, bytes | None]:
    try:
        address = parse_address(connect)
        if address.secure:
            return address, None if ca is None else read_authorities(ca)
        source = click.get_current_context().get_parameter_source("ca")
        if source is ParameterSource.COMMANDLINE:
            raise ValueError(f"--ca has no effect on {address}; use grpcs://{address.host_port}")
        return address, None
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _backend(
    kind: str,
    models: tuple[str, ...],
    device: str,
    dtype: str,
    threads: int,
    pass_tokens: int | None,
    run_bytes: int | None,
    sample_bytes: int | None,
    plug_ins: tuple[str, ...],
    compiling: str,
    cuda_graphs: str,
) -> Backend:
    if kind == "mock":
        from workers.mock import MockBackend

        return MockBackend()
    from workers.losses import LossLoadError, load_losses

    try:
        # Before the models, which take longer.
        losses = load_losses(plug_ins)
    except LossLoadError as error:
        raise click.ClickException(str(error)) from error
    from workers.engine.compiling import Compiling
    from workers.engine.loading import ModelLoadError, load_backend

    try:
        return load_backend(
            models,
            device=device,
            dtype=dtype,
            threads=threads,
            token_budget=pass_tokens,
            run_bytes=run_bytes,
            sample_bytes=sample_bytes,
            losses=losses,
            compiling=Compiling(compiling),
            captures=cuda_graphs == "auto",
        )
    except ModelLoadError as error:
        # Never a mock in place of a model that does not load.
        raise click.ClickException(str(error)) from error


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
