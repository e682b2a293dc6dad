"""One thread that writes: whatever waits is committed together.

A commit with `synchronous=FULL` waits for the disk; under load, everything that arrived during one
commit shares the next (group commit), and the event loop is woken once for all of it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Write = Callable[[sqlite3.Connection], None]
Then = Callable[[], None]
_Item = tuple[Write, "asyncio.Future[None]", Then | None]


class GroupCommitWriter:
    """Executes writes in the order submitted, several in one transaction.

    A write's future resolves after the commit that holds it. If one write of a group fails, the
    group is rolled back and each is committed alone, so that only the failing one sees its error.
    """

    def __init__(self, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Write, then: Then | None = None) -> asyncio.Future[None]:
        """Queues a write; call it from the event loop.

        `then` is called on the event loop after the commit, in the order of the writes, and before
        anyone who awaits one of the group goes on.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((write, future, then))
        return future

    def close(self) -> None:
        """Commits what waits, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            first = self._queue.get()
            if first is None:
                return
            group = [first]
            while True:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    closing = True
                    break
                group.append(item)
            outcomes = self._commit(group)
            self._loop.call_soon_threadsafe(_resolve, group, outcomes)

    def _commit(self, group: list[_Item]) -> list[Exception | None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write, _, _ in group:
                write(self._connection)
            self._connection.execute("COMMIT")
        except Exception as error:
            self._roll_back()
            if len(group) == 1:
                log.exception("a write to the store failed")
                return [error]
            return [self._commit([item])[0] for item in group]
        return [None] * len(group)

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _resolve(group: list[_Item], outcomes: list[Exception | None]) -> None:
    for (_, _, then), error in zip(group, outcomes, strict=True):
        if then is not None and error is None:
            then()
    for (_, future, _), error in zip(group, outcomes, strict=True):
        if future.cancelled():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
