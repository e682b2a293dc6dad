"""A coordinator and its workers as processes of their own, each to be killed and started again."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from local_service import isolated_environment, tensafe_command

from tensafe_client import ServiceClient

_SECRET = re.compile(r"admin key, shown only now: (\S+)")


class Process:
    """A process that can be started again and again, with one log file.

    Attributes:
        starts: how often it was started.
        ready: set while it serves.
        being_revived: killed, and about to be started again.
    """

    def __init__(self, name: str, home: Path, command: Sequence[str], ready_line: str) -> None:
        self.name = name
        self.home = home
        self.starts = 0
        self.ready = threading.Event()
        self.being_revived = False
        self._spoke = threading.Condition()
        self._command = command
        self._ready_line = ready_line
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def log(self) -> str:
        """What it has said so far, in all of its lives."""
        path = self.home / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Starts it; `ready` is set when it serves."""
        self.ready.clear()
        self.starts += 1
        self._process = subprocess.Popen(
            self._command,
            env={
                **isolated_environment(self.home),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(
            target=self._follow, args=(self._process, self.ready), daemon=True
        )
        self._reader.start()

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        assert self.ready.wait(timeout_s), f"{self.name} is not ready\n{self.log[-3000:]}"

    def wait_ended(self, timeout_s: float = 120.0) -> int:
        """Returns the exit status; −9 after SIGKILL."""
        assert self._process is not None
        status = self._process.wait(timeout_s)
        assert self._reader is not None
        self._reader.join(timeout_s)
        return status

    def wait_said(self, text: str, *, count: int = 1, timeout_s: float = 60.0) -> None:
        """Returns when its log, of all of its lives, has `text`, `count` times at least."""
        with self._spoke:
            found = self._spoke.wait_for(lambda: self.log.count(text) >= count, timeout_s)
        assert found, f"{self.name} has not said {text!r} {count} times\n{self.log[-3000:]}"

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.signal(signal.SIGKILL)
        self.wait_ended()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self._process is None:
            return 0
        self.signal(signal.SIGTERM)
        return self.wait_ended()

    def _follow(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout is not None
        with (self.home / f"{self.name}.log").open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                with self._spoke:
                    self._spoke.notify_all()
                if self._ready_line in line:
                    ready.set()
        ready.clear()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_accepted(client: ServiceClient) -> None:
    """Returns when the coordinator has answered for everything that the client has submitted."""
    client._session.io.run(client._session._submitter.flush())


class Cluster:
    """`tensafe server` and `tensafe worker` processes over one data directory.

    Attributes:
        port: where the coordinator listens, in every life of it.
        data: its data directory.
        coordinator: its process.
        workers: the workers' processes, in the order in which they were added.
        worker_key: the secret that they use.
    """

    def __init__(self, home: Path, *options: str, data: Path | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.port = free_port()
        self.data = data or home / "data"
        self.coordinator = Process(
            "coordinator",
            home,
            tensafe_command(
                *("server", "--listen", f"127.0.0.1:{self.port}", "--data", str(self.data)),
                *options,
            ),
            "ready: ",
        )
        self.workers: list[Process] = []
        self._admin_key = ""
        self.worker_key = ""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts the coordinator and makes the keys."""
        self.coordinator.start()
        self.coordinator.wait_ready()
        match = _SECRET.search(self.coordinator.log)
        assert match is not None, self.coordinator.log
        self._admin_key = match[1]
        with ServiceClient(self.target, api_key=self._admin_key) as operator:
            self.worker_key = operator.admin.create_key(kind="worker").secret

    def new_tenant(self, name: str) -> str:
        """Makes a tenant; returns a key of it."""
        with ServiceClient(self.target, api_key=self._admin_key) as operator:
            operator.admin.create_tenant(name)
            return operator.admin.create_key(name).secret

    def add_worker(
        self,
        *options: str,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts one more worker, which connects to `port`: the coordinator's, or a proxy's."""
        name = f"worker-{len(self.workers)}"
        command = [sys.executable, "-m", "workers", "--name", name]
        command += ["--connect", f"127.0.0.1:{port or self.port}", *options]
        worker = Process(name, self.home, command, "connected to ")
        self.workers.append(worker)
        self.start_worker(worker, environment)
        return worker

    def start_worker(self, worker: Process, environment: Mapping[str, str] | None = None) -> None:
        """Starts a worker that has ended."""
        worker.start({"TENSAFE_WORKER_KEY": self.worker_key, **(environment or {})})

    def stop(self) -> list[int]:
        """Ends everything by SIGTERM; the exit statuses, the coordinator's last."""
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        statuses = [worker.wait_ended() for worker in self.workers]
        return [*statuses, self.coordinator.stop()]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.coordinator):
            if process.starts:
                process.kill()
