"""Runs the `tensafe` command as a user does: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from local_service import LocalService, tensafe_command


def run_tensafe(
    service: LocalService, *arguments: str, stdin: str = "", expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs a command against the service by its profile; fails if the exit status is another."""
    ran = subprocess.run(
        tensafe_command(*arguments),
        env=service.environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == expect, f"exit {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran


def run_json(service: LocalService, *arguments: str) -> Any:
    """Runs a command with --json and parses its one document."""
    return json.loads(run_tensafe(service, *arguments, "--json").stdout, parse_constant=_refuse)


def start_tensafe(service: LocalService, *arguments: str) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own, its output in pipes."""
    return subprocess.Popen(
        tensafe_command(*arguments),
        env={**os.environ, **service.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
