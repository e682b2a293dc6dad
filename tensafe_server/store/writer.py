"""One thread that writes: whatever waits is committed together.

A commit with `synchronous=FULL` waits for the disk; under load, everything that arrived during one
commit shares the next (group commit), and the event loop is woken once for all of it.

When the disk does not take it (full, read-only, locked), what a caller may send again fails with
the reason. What only we know, an outcome above all, waits in its order until the disk takes it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from tensafe_server.storage_faults import storage_fault

log = logging.getLogger(__name__)

Write = Callable[[sqlite3.Connection], None]
Then = Callable[[], None]
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class _Item(NamedTuple):
    write: Write
    future: asyncio.Future[None]
    then: Then | None
    insist: bool


class GroupCommitWriter:
    """Executes writes in the order submitted, several in one transaction.

    A write's future resolves after the commit that holds it. If one write of a group fails, the
    group is rolled back and each is committed alone, so that only the failing one sees its error.
    """

    def __init__(self, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(
        self, write: Write, then: Then | None = None, *, insist: bool = False
    ) -> asyncio.Future[None]:
        """Queues a write; call it from the event loop.

        `then` is called on the event loop after the commit, in the order of the writes, and before
        anyone who awaits one of the group goes on. With `insist`, a disk that does not take the
        write is waited for, until `close`.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Item(write, future, then, insist))
        return future

    def close(self) -> None:
        """Commits what waits, as far as the disk takes it, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: list[_Item] = []
        while not self._closing:
            waiting += self._arrived()
            if waiting:
                error, waiting = self._write(waiting)
                if waiting:
                    waiting = self._persist(waiting, error)

    def _arrived(self) -> list[_Item]:
        """Waits for one item; returns it with all that wait behind it."""
        found = []
        item = self._queue.get()
        while item is not None:
            found.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return found
        self._closing = True
        return found

    def _write(self, group: list[_Item]) -> tuple[Exception | None, list[_Item]]:
        """Commits a group; returns why the disk did not take it, and those that insist.

        Their order is kept: what stands behind one that insists is not tried before it.
        """
        error = self._commit(group)
        if error is None:
            self._tell(group, None)
            return None, []
        fault = storage_fault(error)
        if fault is not None:
            log.warning("a write to the store failed: %s", error)
            self._tell([item for item in group if not item.insist], fault)
            return error, [item for item in group if item.insist]
        if len(group) == 1:
            log.error("a write to the store failed", exc_info=error)
            self._tell(group, error)
            return None, []
        for position, item in enumerate(group):
            error, insisting = self._write([item])
            if error is not None:
                rest = group[position + 1 :]
                self._tell([item for item in rest if not item.insist], storage_fault(error))
                return error, [*insisting, *(item for item in rest if item.insist)]
        return None, []

    def _persist(self, insisting: list[_Item], error: Exception | None) -> list[_Item]:
        """Tries again until the disk takes what insists; refuses everything else meanwhile."""
        began = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        log.error("the store cannot be written (%s); %d outcomes wait", error, len(insisting))
        while insisting and not self._closing:
            arrived = self._pause(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            error, insisting = self._write([*insisting, *arrived])
        if insisting:
            self._tell(insisting, (error and storage_fault(error)) or error)
        else:
            log.warning("the store can be written again, after %.1f s", time.monotonic() - began)
        return []

    def _pause(self, seconds: float) -> list[_Item]:
        """Returns what arrives meanwhile; ends early for whoever closes."""
        deadline = time.monotonic() + seconds
        found: list[_Item] = []
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left_s)
            except queue.Empty:
                break
            if item is None:
                self._closing = True
                break
            found.append(item)
        return found

    def _commit(self, group: list[_Item]) -> Exception | None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for item in group:
                item.write(self._connection)
            self._connection.execute("COMMIT")
        except Exception as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return error
        return None

    def _tell(self, group: list[_Item], error: Exception | None) -> None:
        if group:
            self._loop.call_soon_threadsafe(_resolve, group, error)


def _resolve(group: list[_Item], error: Exception | None) -> None:
    for item in group if error is None else ():
        try:
            if item.then is not None:
                item.then()
        except Exception:  # what others have written is on disk, and they are told
            log.exception("what was to follow a write to the store failed")
    for item in group:
        if item.future.cancelled():
            continue
        if error is None:
            item.future.set_result(None)
        else:
            item.future.set_exception(error)
