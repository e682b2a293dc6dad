"""Starts worker processes on this machine, and starts them again when they die."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_LONG_LIFE_S = 60.0
_CRASH_LOOP = 5
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"

EXIT_WATCHDOG = 75
"""Exit status of a worker that its own watchdog has ended (`workers/watchdog.py`)."""


class WorkerStartError(RuntimeError):
    """A worker ended before it had ever served: its own message says why."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start one worker: its arguments after `worker`, and its key."""

    name: str
    arguments: Sequence[str]
    key: str


class LocalLauncher:
    """Runs workers as child processes, which end when this process does, however it ends: their
    standard input closes then.

    A worker that ends unasked is started again, after a pause that doubles from 0.5 s to 30 s while
    it lives less than a minute each time; from the fifth such death on it is an error in the log.
    One that has never served is not started again: what it said on stderr is the error.
    What a worker leaves in its temporary directory is removed, also if it was killed.
    """

    def __init__(self) -> None:
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self.served: set[str] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, spec: WorkerSpec) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._keep(spec)))

    async def stop(self, grace_s: float) -> None:
        """Asks every worker to end; kills those that have not after `grace_s` seconds."""
        self._stopping.set()
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            if late:
                for process in self._processes.values():
                    if process.returncode is None:
                        process.kill()
                await asyncio.wait(late)

    async def _keep(self, spec: WorkerSpec) -> None:
        loop = asyncio.get_running_loop()
        deaths, pause_s = 0, _FIRST_PAUSE_S
        while not self._stopping.is_set():
            began = loop.time()
            how = await self._live(spec)
            if self._stopping.is_set():
                return
            if spec.name not in self.served:
                if not self.failed.done():
                    self.failed.set_exception(
                        WorkerStartError(f"{spec.name} {how} before it served")
                    )
                return
            if loop.time() - began > _LONG_LIFE_S:
                deaths, pause_s = 0, _FIRST_PAUSE_S
            deaths += 1
            log.log(
                logging.ERROR if deaths >= _CRASH_LOOP else logging.WARNING,
                "%s %s, for the %d. time in a row; starting it again in %.1f s",
                *(spec.name, how, deaths, pause_s),
            )
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _live(self, spec: WorkerSpec) -> str:
        """One life of a worker; returns how it ended."""
        try:
            # Gone after it, whatever ended it: tenants' adapters lie there.
            with tempfile.TemporaryDirectory(
                prefix=f"tensafe-{spec.name}-", ignore_cleanup_errors=True
            ) as scratch:
                return _how(await self._run(spec, scratch))
        except OSError as error:  # no memory, processes or disk, as where workers are killed
            return f"could not be started ({error.strerror})"

    async def _run(self, spec: WorkerSpec, scratch: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "workers",
            *spec.arguments,
            "--follow-stdin",
            stdin=asyncio.subprocess.PIPE,
            # A terminal's Ctrl-C goes to the whole group: workers hear of it from us alone.
            start_new_session=True,
            env={
                # Compiled kernels outlive the worker.
                _COMPILED: f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
                **os.environ,
                "TMPDIR": scratch,
                "TENSAFE_WORKER_KEY": spec.key,
            },
        )
        self._processes[spec.name] = process
        if self._stopping.is_set():
            process.terminate()
        return await process.wait()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _how(code: int) -> str:
    """How a process ended, for people."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; if nobody did, the machine ran out of memory)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    if code == EXIT_WATCHDOG:
        return "was ended by its watchdog: an operation ran beyond its limit"
    return f"ended with status {code}"
