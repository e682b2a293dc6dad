"""Services that tests kill: the processes behind a `tensafe up`, and starting it again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from local_cluster import free_port
from local_service import LocalService, isolated_environment, tensafe_command


def worker_pids(service: LocalService) -> list[int]:
    """Process ids of the service's workers."""
    pid = service.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"workers" in _command_line(child)]


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return b""


def kill_worker(service: LocalService) -> None:
    """SIGKILLs the service's only worker."""
    [pid] = worker_pids(service)
    os.kill(pid, signal.SIGKILL)


class Restartable:
    """`tensafe up` on a fixed port, to be killed and started again over the same data."""

    def __init__(self, home: Path, *options: str) -> None:
        self._home = home
        self._options = options
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts it, and returns when it serves."""
        with (self._home / "service.log").open("a") as log:
            self.process = subprocess.Popen(
                tensafe_command(
                    *("up", "--listen", f"127.0.0.1:{self.port}", "--data", str(self._home / "d")),
                    *self._options,
                ),
                env=isolated_environment(self._home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), (self._home / "service.log").read_text()

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)


def wait_until_gone(pid: int, timeout_s: float = 30.0) -> None:
    """Returns when a process that is not our child has ended."""
    handle = os.pidfd_open(pid)
    try:
        import select

        poller = select.poll()
        poller.register(handle, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        assert poller.poll(max(0.0, deadline - time.monotonic()) * 1e3), f"{pid} still runs"
    finally:
        os.close(handle)
