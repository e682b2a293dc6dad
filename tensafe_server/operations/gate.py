"""The gate between accepted and queued: operations pass it when they are on disk.

Under load, calls that arrive close together pass it together. Every step behind it then handles a
group: one commit, one plan, one report, one push. Alone, an operation passes at once; otherwise the
gate stays open for a time that grows with the number of unfinished operations and is short against
the time that they take (the coalescing of network interrupts is the same idea).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from tensafe import failpoints
from tensafe_server.events.hub import EventHub
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation
from tensafe_server.operations.outcomes import ended_event
from tensafe_server.store.base import Store

_FEW_UNFINISHED = 16
_LINGER_S_EACH = 40e-6
_LONGEST_LINGER_S = 5e-3
_FULL_GROUP = 64


class _Group:
    def __init__(self) -> None:
        self.operations: list[PendingOperation] = []
        self.timer: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def wait(self) -> asyncio.Future[None]:
        """Resolves when the group is stored; of the caller alone, who may cancel it."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def tell(self, error: BaseException | None) -> None:
        for waiter in self._waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


class Gate:
    """Stores accepted operations, then puts them into their order."""

    def __init__(self, store: Store, ledger: Ledger, hub: EventHub) -> None:
        self._store = store
        self._ledger = ledger
        self._hub = hub
        self._group: _Group | None = None

    async def stored(self, operations: Sequence[PendingOperation]) -> None:
        """Returns when the operations are on disk and queued. A caller that goes away meanwhile
        changes nothing: they are accepted.

        Raises:
            Exception: what the store raised; then none of the group was accepted.
        """
        if self._group is None:
            self._group = _Group()
            unfinished = self._ledger.unfinished - len(operations)
            if unfinished >= _FEW_UNFINISHED:
                linger_s = min(_LONGEST_LINGER_S, unfinished * _LINGER_S_EACH)
                self._group.timer = asyncio.get_running_loop().call_later(linger_s, self._close)
        group = self._group
        group.operations += operations
        waiter = group.wait()
        if group.timer is None or len(group.operations) >= _FULL_GROUP:
            self._close()
        await waiter

    async def passed(self) -> None:
        """Returns when nothing stands before the gate any more that does now."""
        if self._group is not None:
            with suppress(Exception):  # whoever stands there is told
                await self._group.wait()

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if group.timer is not None:
            group.timer.cancel()
        for operation in group.operations:
            if operation.void:  # refused: it ends here, and events are numbered as they are stored
                operation.row.cursor = self._hub.next_cursor()
        rows = [operation.row for operation in group.operations]
        stored = self._store.add_operations(rows, lambda: self._admit(group.operations))
        stored.add_done_callback(lambda done: self._tell(group, done))

    def _admit(self, operations: Sequence[PendingOperation]) -> None:
        failpoints.hit("after-commit-before-reply")
        self._ledger.admit(operations)
        self._hub.publish(ended_event(operation) for operation in operations if operation.void)

    def _tell(self, group: _Group, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._ledger.withdraw(group.operations)
        group.tell(error)
