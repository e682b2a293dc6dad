"""A TenSafe service of one's own for a script or a test: `tensafe up` on a free loopback port.

    with local_service(backend="mock") as service:
        client = ServiceClient(service.target, api_key=service.api_key)

Everything it writes (data, keys, profile) lies in a temporary directory; nothing of the user's own
configuration is read or changed. It ends by SIGTERM, and an exit status other than 0 is an error.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROFILE = "local"
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL_LINES = 25


class LocalServiceError(RuntimeError):
    """The service did not start, or did not end as it should."""


@dataclass(frozen=True)
class LocalService:
    """A running service.

    Attributes:
        target: `grpc://HOST:PORT`.
        api_key: key of the first tenant.
        admin_key: key that manages tenants and keys.
        directory: where its data, profile and log are.
        process: the `tensafe up` process.
    """

    target: str
    api_key: str
    admin_key: str
    directory: Path
    process: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which the `tensafe` command talks to this service."""
        return isolated_environment(self.directory)

    @property
    def log(self) -> str:
        """What the service has written to stderr so far."""
        return _log_path(self.directory).read_text(errors="replace")


def tensafe_command(*arguments: str) -> list[str]:
    """The command line that runs `tensafe` with this interpreter."""
    return [sys.executable, "-m", "tensafe_client.cli", *arguments]


def isolated_environment(directory: Path) -> dict[str, str]:
    """This process's environment with TenSafe's configuration replaced by one in `directory`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"TENSAFE_TARGET", "TENSAFE_API_KEY", "TENSAFE_PROFILE", "TENSAFE_CA"}
    }
    return {**kept, "TENSAFE_CONFIG": str(directory / "config.toml"), "PYTHONUNBUFFERED": "1"}


@contextmanager
def local_service(
    *,
    backend: str = "mock",
    models: Sequence[str] = (),
    workers: int = 1,
    options: Sequence[str] = (),
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    ready_timeout_s: float = 240.0,
) -> Iterator[LocalService]:
    """Starts a service, yields it when it serves, and ends it.

    Args:
        backend: `mock` or `torch`.
        models: what `--model` is given, each `REF` or `NAME=REF`.
        workers: worker processes.
        options: further options of `tensafe up`.
        directory: where to keep data and profile; kept afterwards. Unset: a temporary one.
        environment: added to the service's environment.
        ready_timeout_s: longest wait for the line `ready:`.

    Raises:
        LocalServiceError: if it does not come up, or does not exit with 0.
    """
    with tempfile.TemporaryDirectory(prefix="tensafe-") as temporary:
        home = directory or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        command = tensafe_command(
            *("up", "--listen", "127.0.0.1:0", "--data", str(home / "data")),
            *("--backend", backend, "--workers", str(workers), "--profile", PROFILE),
            *(part for model in models for part in ("--model", model)),
            *options,
        )
        with _log_path(home).open("a") as log:
            process = subprocess.Popen(
                command,
                env={**isolated_environment(home), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            target = _wait_until_ready(process, home, ready_timeout_s)
            profiles = tomllib.loads((home / "config.toml").read_text())["profiles"]
            service = LocalService(
                target=target,
                api_key=profiles[PROFILE]["api_key"],
                admin_key=profiles[f"{PROFILE}-admin"]["api_key"],
                directory=home,
                process=process,
            )
            yield service
        finally:
            status = _stop(process)
        if status != 0:
            raise LocalServiceError(f"`tensafe up` exited with {status}\n{_log_tail(home)}")


def _wait_until_ready(process: subprocess.Popen[str], home: Path, timeout_s: float) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    while (remaining_s := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([process.stdout], [], [], remaining_s)
        if not readable:
            break
        line = process.stdout.readline()
        if line.startswith("ready: "):
            return line.removeprefix("ready: ").strip()
        if not line:
            process.wait()
            raise LocalServiceError(
                f"`tensafe up` exited with {process.returncode} before it was ready\n"
                f"{_log_tail(home)}"
            )
    raise LocalServiceError(f"`tensafe up` was not ready in {timeout_s:.0f} s\n{_log_tail(home)}")


def _stop(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _log_path(home: Path) -> Path:
    return home / "service.log"


def _log_tail(home: Path) -> str:
    lines = _log_path(home).read_text(errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-_LOG_TAIL_LINES:])
