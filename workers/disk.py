"""A worker's own disk: artifacts at hand, and states on their way to and from the coordinator."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tensafe.wire.status import TenSafeFault

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def own_disk() -> Iterator[None]:
    """What is executed in here writes temporary files.

    Raises:
        TenSafeFault: WORKER_DISK_FULL, where it failed for want of room.
    """
    try:
        yield
    except TenSafeFault:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        raise _full() from error


def _is_full(error: Exception) -> bool:
    # safetensors writes by itself, and tells the error of the disk in its own one's text.
    return (isinstance(error, OSError) and error.errno in _FULL) or any(
        os.strerror(number) in str(error) for number in _FULL
    )


def _full() -> TenSafeFault:
    directory = tempfile.gettempdir()
    free_mib = shutil.disk_usage(directory).free / 2**20
    return TenSafeFault(
        "WORKER_DISK_FULL",
        f"the worker on {socket.gethostname()} has no room for temporary files: {free_mib:.1f} MiB "
        f"are free in {directory}. Free some there, or start it with another TMPDIR; then send the "
        "operation again",
    )
