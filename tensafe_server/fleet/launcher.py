"""Starts worker processes on this machine, and starts them again when they die."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_LONG_LIFE_S = 60.0


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

    A worker that ends unasked is started again, after a pause that grows while it keeps dying; one
    that has never served is not: what it said on stderr is the error.
    """

    def __init__(self) -> None:
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.served: set[str] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, spec: WorkerSpec) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._keep(spec)))

    async def stop(self, grace_s: float) -> None:
        """Asks every worker to end; kills those that have not after `grace_s` seconds."""
        self._stopping = True
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
        pause_s = _FIRST_PAUSE_S
        while not self._stopping:
            began = loop.time()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "workers",
                *spec.arguments,
                "--follow-stdin",
                stdin=asyncio.subprocess.PIPE,
                env={**os.environ, "TENSAFE_WORKER_KEY": spec.key},
            )
            self._processes[spec.name] = process
            if self._stopping:
                process.terminate()
            code = await process.wait()
            if self._stopping:
                return
            if spec.name not in self.served:
                if not self.failed.done():
                    self.failed.set_exception(
                        WorkerStartError(f"{spec.name} ended with status {code} before it served")
                    )
                return
            if loop.time() - began > _LONG_LIFE_S:
                pause_s = _FIRST_PAUSE_S
            log.warning("%s ended with status %d; starting it again", spec.name, code)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
