"""Where the specs of waiting operations are: the next ones in memory, the others in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation
from tensafe_server.store.base import Store

log = logging.getLogger(__name__)

_AHEAD_OPERATIONS = 16
_AHEAD_BYTES = 4 * 2**20
_RETRY_S = 1.0


class SpecReader:
    """Brings specs back into memory before their operations are sent.

    Attributes:
        on_read: called when some have come.
        on_missing: called with an operation whose spec is no longer in the blob store, or damaged.
    """

    def __init__(self, store: Store, payloads: Payloads, ledger: Ledger) -> None:
        self._store = store
        self._payloads = payloads
        self._ledger = ledger
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_read: Callable[[], None] = lambda: None
        self.on_missing: Callable[[PendingOperation], None] = lambda operation: None

    def fetch(self, operations: Sequence[PendingOperation]) -> None:
        """Begins to read what is missing of the first few of these, the next one first."""
        wanted: list[PendingOperation] = []
        size = 0
        for operation in operations[:_AHEAD_OPERATIONS]:
            size += operation.spec_bytes
            if wanted and size > _AHEAD_BYTES:
                break
            if operation.spec is None and not operation.fetching and not operation.void:
                operation.fetching = True
                wanted.append(operation)
        if wanted:
            task = asyncio.get_running_loop().create_task(self._read(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, operations: Sequence[PendingOperation]) -> None:
        try:
            places = await self._store.specs([operation.row.id for operation in operations])
            for operation in operations:
                spec, reference = places[operation.row.id]
                try:
                    self._ledger.hold(operation, await self._payloads.load(spec, reference))
                except (BlobNotFoundError, DamagedPayloadError):
                    log.exception("the spec of %s is gone or damaged", operation.row.id)
                    self.on_missing(operation)
        except Exception:
            log.exception("specs of waiting operations could not be read; trying again")
            await asyncio.sleep(_RETRY_S)
        finally:
            for operation in operations:
                operation.fetching = False
            self.on_read()
