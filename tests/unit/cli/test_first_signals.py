"""Signals from the first moment on: while a command is imported, or starts up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tensafe_client.cli import entry
from tensafe_client.cli.lazy import LazyCommand, LazyGroup

SLOW = """
import sys, types
from tensafe_client.cli import main

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "tensafe_server":
            print("importing", flush=True)
            sys.stdin.read()

sys.meta_path.insert(0, Slow())
main.main(prog_name="tensafe")
"""
ENTRY = """
import sys
from tensafe_client.cli import entry

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "tensafe_client.cli.main":
            print("importing", flush=True)
            sys.stdin.read()

sys.meta_path.insert(0, Slow())
entry.main(prog_name="tensafe")
"""
STARTING = """
import sys, click
from tensafe_client.cli.lazy import LazyCommand, LazyGroup

@click.command()
def serve():
    try:
        print("starting", flush=True)
        sys.stdin.read()
    finally:
        print("cleaned up", flush=True)

lazy = LazyCommand("__main__:serve", "Serves.", serves=True)
LazyGroup("main", lazy_commands={"serve": lazy})()
"""


def interrupt(script: str, command: str, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal after the first line of output; returns exit status and output after it."""
    with subprocess.Popen(
        [sys.executable, "-c", script, command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(number)
        try:
            status = process.wait(timeout=30)
        finally:
            process.kill()
        return status, process.stdout.read()


@pytest.mark.parametrize("command", ["up", "server"])
def test_during_the_import(command: str):
    assert interrupt(SLOW, command, signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("command", ["up", "runs", "--help"])
def test_control_c_during_the_import_leaves_no_traceback(command: str):
    assert interrupt(ENTRY, command, signal.SIGINT) == (130, "")


def test_after_the_import_what_began_is_cleaned_up():
    assert interrupt(STARTING, "serve", signal.SIGTERM) == (0, "cleaned up\n")


@click.command()
def probe() -> None:
    assert callable(signal.getsignal(signal.SIGTERM))


def test_the_handler_goes_with_the_command():
    before = signal.getsignal(signal.SIGTERM)
    lazy = LazyCommand(f"{__name__}:probe", "Looks.", serves=True)
    shown = CliRunner().invoke(LazyGroup("main", lazy_commands={"probe": lazy}), ["probe"])
    assert shown.exit_code == 0, shown.output
    assert signal.getsignal(signal.SIGTERM) is before


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler, from the kernel's view of it."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("delay_ms", [0, 50, 100, 300, 800, None])
def test_right_after_the_start(delay_ms: int | None, tmp_path: Path):
    """Before the handler stands, Python is starting, and the system's own 143 is the truth. None:
    as soon as it stands."""
    command = ("up", "--backend", "mock", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "d"))
    with subprocess.Popen(
        [sys.executable, "-m", "tensafe_client.cli", *command, "--no-profile"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        time.sleep((delay_ms or 0) / 1e3)  # what is tested
        give_up = time.monotonic() + 60
        while delay_ms is None and not catches_sigterm(process.pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        stood = catches_sigterm(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(timeout=60)
        finally:
            process.kill()
    assert status == 0 or (not stood and status == -signal.SIGTERM)
    assert stood or delay_ms is not None  # or this tests nothing


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["up"], "up"),
        (["--target", "up", "runs"], "runs"),
        (["--profile=x", "server"], "server"),
        (["--api-key", "k", "worker", "--connect", "x"], "worker"),
        (["--help"], ""),
        (["--target"], ""),
    ],
)
def test_the_command_is_known_before_the_command_line_is_parsed(arguments: list[str], command: str):
    assert entry._command(arguments) == command
