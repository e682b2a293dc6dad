"""Where the command `tensafe` begins: it minds SIGTERM before anything else is imported.

A command that serves ends with 0 on SIGTERM, and that from here on: what follows takes the better
part of a second to import. Before this, while Python itself starts, a signal ends the process as
the system does (143).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

SERVING = frozenset({"up", "server", "worker"})
_WITH_VALUE = frozenset({"--target", "--api-key", "--profile", "--ca"})
_INTERRUPTED = 130


def main(prog_name: str | None = None) -> None:
    """Runs the command line."""
    if _command(sys.argv[1:]) in SERVING:
        signal.signal(signal.SIGTERM, _end)
        # Before gRPC is imported: else it notes at each start of a worker that it cannot be forked.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        from tensafe_client.cli.main import main as run
    except KeyboardInterrupt:
        # A traceback through the midst of an import would tell nobody anything.
        os._exit(_INTERRUPTED)
    run(prog_name=prog_name)


def _command(arguments: list[str]) -> str:
    """The command that the arguments name, empty if none."""
    remaining = iter(arguments)
    for argument in remaining:
        if argument in _WITH_VALUE:
            next(remaining, None)
        elif not argument.startswith("-"):
            return argument
    return ""


def _end(_number: int, _frame: FrameType | None) -> None:
    # Nothing runs yet, and an exception in the midst of an import may be swallowed.
    os._exit(0)
