"""Connections to the SQLite file, and what the first one finds there after a crash."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from tensafe_server.store.base import StoreDamagedError
from tensafe_server.store.wal import read_wal

log = logging.getLogger(__name__)

_BUSY_TIMEOUT_MS = 1000
"""How long a write waits for the lock of another process, which the data directory's own lock lets
only foreign tools have."""


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file as every connection of ours has it, for use from any one thread at a time."""
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def connect_and_recover(path: Path) -> sqlite3.Connection:
    """The first connection after a start. What the write-ahead log has visibly lost at its end, the
    process's log says; not every damage can be seen, and nothing else depends on it.

    Raises:
        StoreDamagedError: if that would be all of it; nothing is changed.
    """
    log_path = path.with_name(path.name + "-wal")
    wal = read_wal(log_path)
    if wal.unreadable:
        raise StoreDamagedError(
            f"the header of {log_path} is damaged, so its {wal.size_bytes} bytes of committed "
            "transactions cannot be read; restore the directory from a backup, or move this file "
            "away to start without what it held"
        )
    _make_private(path)
    connection = connect(path)
    try:
        if wal.frame_bytes:
            _, kept_frames, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            lost = wal.lost(max(0, int(kept_frames)))
            if lost:
                log.warning("%s: %s", path, lost)
    except BaseException:
        connection.close()
        raise
    return connection


def _make_private(path: Path) -> None:
    """Makes a new file that its owner alone can read: tenants' data lies in it, and the directory
    may be one that everybody can enter. SQLite gives the files beside it the same mode."""
    with suppress(OSError):  # SQLite says better what is wrong
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
