"""When the disk does not take what we write: which errors pass by themselves, and their names."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from tensafe.wire.status import TenSafeFault

RETRY_AFTER_S = 0.5

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_SQLITE_UNWRITABLE = {
    sqlite3.SQLITE_BUSY: "another process holds a lock on the store",
    sqlite3.SQLITE_LOCKED: "another process holds a lock on the store",
    sqlite3.SQLITE_READONLY: "the store's disk is read-only",
    sqlite3.SQLITE_IOERR: "the store's disk fails",
    sqlite3.SQLITE_CANTOPEN: "the store's files cannot be opened",
    sqlite3.SQLITE_PERM: "the store's files may not be written",
}


def storage_fault(error: BaseException) -> TenSafeFault | None:
    """The fault that callers get for an error of the disk or of SQLite; None if it is another kind
    of error, which no waiting will mend."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return _full("the store's disk is full")
        cause = _SQLITE_UNWRITABLE.get(code)
        return None if cause is None else _unavailable(cause)
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return _full("the disk of artifacts and payloads is full")
        if error.errno in _UNWRITABLE:
            return _unavailable(f"artifacts and payloads cannot be written ({error.strerror})")
    return None


@contextmanager
def disk_writes() -> Iterator[None]:
    """Turns an OSError of the disk into its fault.

    Raises:
        TenSafeFault: STORAGE_FULL, STORAGE_UNAVAILABLE.
    """
    try:
        yield
    except OSError as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        raise fault from error


def _full(cause: str) -> TenSafeFault:
    return TenSafeFault(
        "STORAGE_FULL",
        f"{cause}, so nothing of this was stored; the operator has to free space there. Sending "
        "it again is safe",
        retry_delay_s=RETRY_AFTER_S,
        resource="storage",
    )


def _unavailable(cause: str) -> TenSafeFault:
    return TenSafeFault(
        "STORAGE_UNAVAILABLE",
        f"{cause}, so nothing of this was stored; the operator's log says more. Sending it again "
        "is safe",
        retry_delay_s=RETRY_AFTER_S,
        resource="storage",
    )
