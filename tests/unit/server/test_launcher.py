"""The launcher starts workers again, slower and slower, and says what ended them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tensafe_server.fleet import launcher as module
from tensafe_server.fleet.launcher import LocalLauncher, WorkerSpec, WorkerStartError
from workers.watchdog import EXIT_HUNG


@asynccontextmanager
async def said(text: str) -> AsyncIterator[None]:
    """Ends when the launcher's log has a text."""
    seen = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                seen.set()

    watch = Watch()
    logger = logging.getLogger(module.__name__)
    logger.addHandler(watch)
    try:
        yield
        await asyncio.wait_for(seen.wait(), 30)
    finally:
        logger.removeHandler(watch)


def test_a_crash_loop_slows_down_and_is_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Workers whose arguments are wrong end at once."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.004)
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        launcher = LocalLauncher()
        launcher.served.add("w")
        async with said("6. time"):
            launcher.start(WorkerSpec("w", [], "k"))
        await launcher.stop(5)

    asyncio.run(main())
    lines = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in lines[:6]] == [logging.WARNING] * 4 + [logging.ERROR] * 2
    assert "w ended with status 1, for the 1. time in a row; starting it again in 0.0 s" in lines[0]


def test_stopping_does_not_wait_for_a_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 3600.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        launcher = LocalLauncher()
        launcher.served.add("w")
        async with said("starting it again in 3600.0 s"):
            launcher.start(WorkerSpec("w", [], "k"))
        await asyncio.wait_for(launcher.stop(3600), 30)

    asyncio.run(main())


def test_a_worker_that_never_served_is_not_started_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        launcher = LocalLauncher()
        launcher.start(WorkerSpec("w", [], "k"))
        with pytest.raises(WorkerStartError, match="w ended with status 1 before it served"):
            await asyncio.wait_for(launcher.failed, 30)
        await launcher.stop(5)

    asyncio.run(main())


def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Where there is no memory for another process, a worker has just been killed for it."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)
    start = asyncio.create_subprocess_exec
    tries = 0

    async def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", failing)
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        launcher = LocalLauncher()
        launcher.served.add("w")
        async with said("w ended with status 1, for the 3. time"):
            launcher.start(WorkerSpec("w", [], "k"))
        await launcher.stop(5)

    asyncio.run(main())
    assert "w could not be started (Cannot allocate memory), for the 1. time" in caplog.text


def test_what_a_killed_worker_leaves_behind_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    told, program = tmp_path / "told", tmp_path / "worker"
    program.write_text(
        f'#!/bin/sh\necho x >"$TMPDIR/adapter"\nls "$TMPDIR"/* >{told}\nkill -9 $$\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 3600.0)
    monkeypatch.setattr(sys, "executable", str(program))

    async def main() -> None:
        launcher = LocalLauncher()
        launcher.served.add("w")
        async with said("w was killed"):
            launcher.start(WorkerSpec("w", [], "k"))
        await launcher.stop(5)

    asyncio.run(main())
    left = Path(told.read_text().strip())
    assert left.name == "adapter"
    assert left.parent.name.startswith("tensafe-w-")
    assert not left.parent.exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (-signal.SIGKILL, "ran out of memory"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (EXIT_HUNG, "watchdog"),
        (3, "ended with status 3"),
    ],
)
def test_it_says_what_ended_a_worker(code: int, says: str):
    assert says in module._how(code)
