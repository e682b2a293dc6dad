"""Fan-out of events to watchers.

The store is the buffer: a subscription holds only a bounded number and size of newest events, and
one that falls further behind reads from the store again. So a slow watcher costs a constant amount
of memory and holds nobody up. It gets every operation, and of the metrics that it has fallen behind
a few, which say how many lie between them; whoever asks for those after a cursor gets them all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

from tensafe.v1 import operations_pb2 as pb
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.payloads import INLINE_BYTES, Payloads
from tensafe_server.events.translate import operation_message
from tensafe_server.ids import first_number
from tensafe_server.store.base import EventScope, Store

log = logging.getLogger(__name__)

_BUFFER_EVENTS = 2048
_BUFFER_BYTES = 4 * 2**20
_PAGE_EVENTS = 256
_PAGE_BYTES = 2 * 2**20
# Of each time that a watcher falls behind, about so many steps' metrics, and each run's newest.
_COALESCED_STEPS = 64
# Of all subscriptions together: many have less each, down to the second value.
_ALL_BYTES = 32 * 2**20
_LEAST_BYTES = 32 * 2**10
_LEAST_ROWS = 4


class Event(NamedTuple):
    """One thing that happened, as watchers get it."""

    cursor: int
    tenant_id: str
    run_id: str
    session_id: str
    message: pb.WatchEvent
    size: int = 0

    @property
    def is_metrics(self) -> bool:
        return self.message.WhichOneof("event") == "metrics"


class Subscription:
    """One watcher's view: events of its scope that were published since it was made.

    Attributes:
        behind: what comes next is in the store.
        followed: it was up with what happens, and if it is behind now, it has fallen behind.
    """

    def __init__(self, scope: EventScope, cursor: int) -> None:
        self.scope = scope
        self.cursor = cursor
        self.events: deque[Event] = deque()
        self.size = 0
        self.behind = False
        self.followed = False
        self.closed = False
        self.fault: TenSafeFault | None = None
        self.wake = asyncio.Event()

    def offer(self, event: Event, limit_bytes: int) -> None:
        """Takes an event, unless as much as `limit_bytes` waits already: then it falls behind."""
        if not _matches(self.scope, event):
            return
        if len(self.events) >= _BUFFER_EVENTS or self.size > limit_bytes:
            self.clear()
            self.behind = True
        if not self.behind:
            self.events.append(event)
            self.size += event.size
        self.wake.set()

    def take(self) -> Event:
        event = self.events.popleft()
        self.size -= event.size
        return event

    def clear(self) -> None:
        self.events.clear()
        self.size = 0


class EventHub:
    """Numbers events and gives them to watchers.

    Attributes:
        first_cursor: what this start of the coordinator numbers its first event with. It lies
            beyond every cursor that was told before, also of events that the store has lost: they
            are given to no other event, which their watchers would pass over.
    """

    def __init__(self, store: Store, payloads: Payloads) -> None:
        self._store = store
        self._payloads = payloads
        self.first_cursor = self._next = 1
        self._published = self._newest_read = 0
        self._said_lost = False
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._closed: TenSafeFault | None = None

    async def load(self) -> None:
        self._published = self._newest_read = await self._store.last_cursor()
        self.first_cursor = self._next = max(self._published + 1, first_number())

    def next_cursor(self) -> int:
        """The number of the next event. Events must be committed and published in this order."""
        cursor = self._next
        self._next += 1
        return cursor

    def publish(self, events: Iterable[Event]) -> None:
        """Gives committed events to those who watch."""
        limit_bytes = self._share(_BUFFER_BYTES)
        for event in events:
            self._published = event.cursor
            for subscription in self._subscriptions.get(event.tenant_id, ()):
                subscription.offer(event, limit_bytes)

    def _share(self, most_bytes: int) -> int:
        """What one subscription may hold, in its buffer or in the page that is being written."""
        count = sum(len(group) for group in self._subscriptions.values())
        return min(most_bytes, max(_LEAST_BYTES, _ALL_BYTES // max(1, count)))

    def close(self, fault: TenSafeFault) -> None:
        """Fails all streams, now and from now on, once they have told what happened: an end without
        an error would say that nothing more will ever come."""
        self._closed = fault
        for group in self._subscriptions.values():
            for subscription in group:
                subscription.fault = fault
                subscription.closed = True
                subscription.wake.set()

    def close_run(self, run_id: str) -> None:
        """Ends the streams that follow only this run."""
        for group in self._subscriptions.values():
            for subscription in group:
                if subscription.scope.run_id == run_id:
                    subscription.closed = True
                    subscription.wake.set()

    async def stream(
        self, scope: EventScope, cursor: int | None, *, follow: bool = True
    ) -> AsyncIterator[tuple[list[pb.WatchEvent], int]]:
        """Events after `cursor` (None: from now on) in pages, each with the cursor after it.

        The first page comes at once, maybe empty. Without `follow` the stream ends at the event
        that was newest when it began.

        Raises:
            TenSafeFault: CURSOR_OUT_OF_RANGE for a cursor from the future, or what the hub was
                closed with.
        """
        if self._closed is not None:
            raise self._closed
        if cursor is not None and self._newest_read < cursor < self.first_cursor:
            self._say_lost(cursor)
        elif cursor is not None and cursor > self._published:
            raise TenSafeFault(
                "CURSOR_OUT_OF_RANGE",
                f"cursor {cursor} is beyond the newest event, {self._published}; "
                "begin at 0 or at a cursor that this server sent",
                field="cursor",
                newest=self._published,
            )
        subscription = Subscription(scope, self._published if cursor is None else cursor)
        group = self._subscriptions.setdefault(scope.tenant_id, set())
        group.add(subscription)
        try:
            subscription.behind = cursor is not None
            subscription.followed = cursor is None
            yield [], subscription.cursor
            async for page in self._pages(subscription, follow):
                yield page
        finally:
            group.discard(subscription)
            if not group:
                self._subscriptions.pop(scope.tenant_id, None)

    def _say_lost(self, cursor: int) -> None:
        """Somebody was told of an event that the store does not have, or says so. All that is new
        lies beyond it, and is told from there on."""
        if not self._said_lost:
            self._said_lost = True
            log.warning(
                "a client goes on from event %d, but the newest in the store was %d at the start: "
                "if a server has told it, what was last written to the store is lost (a broken "
                "disk, or a backup that was put back), and with it operations that were accepted",
                *(cursor, self._newest_read),
            )

    async def _pages(
        self, subscription: Subscription, follow: bool
    ) -> AsyncIterator[tuple[list[pb.WatchEvent], int]]:
        while True:
            while subscription.behind:
                subscription.clear()
                subscription.behind = False
                async for page in self._stored(subscription):
                    yield page
                subscription.followed = True
            if not follow:
                return
            while subscription.events:
                events: list[pb.WatchEvent] = []
                size, page_bytes = 0, self._share(_PAGE_BYTES)
                while subscription.events and len(events) < _PAGE_EVENTS and size < page_bytes:
                    event = subscription.take()
                    if event.cursor > subscription.cursor:
                        subscription.cursor = event.cursor
                        events.append(event.message)
                        size += event.size
                if events:
                    yield events, subscription.cursor
            if subscription.behind:
                continue
            if subscription.fault is not None:
                raise subscription.fault
            if subscription.closed:
                return
            subscription.wake.clear()
            await subscription.wake.wait()

    async def _stored(
        self, subscription: Subscription
    ) -> AsyncIterator[tuple[list[pb.WatchEvent], int]]:
        up_to, scope = self._published, subscription.scope
        coalesced: Sequence[StepMetrics] | None = None
        if subscription.followed and scope.include_metrics:
            coalesced = await self._store.coalesced_metrics(
                scope, subscription.cursor, up_to, _COALESCED_STEPS
            )
        while subscription.cursor < up_to:
            events, subscription.cursor = await self._stored_page(subscription, up_to, coalesced)
            if events:
                yield events, subscription.cursor

    async def _stored_page(
        self,
        subscription: Subscription,
        up_to: int,
        coalesced: Sequence[StepMetrics] | None,
    ) -> tuple[list[pb.WatchEvent], int]:
        """The next events and the cursor after them. What was read for it ends with this call:
        while a slow watcher takes the page, nothing else is held for it."""
        scope, after = subscription.scope, subscription.cursor
        page_bytes = self._share(_PAGE_BYTES)
        rows_limit = min(_PAGE_EVENTS, max(_LEAST_ROWS, page_bytes // INLINE_BYTES))
        found: list[tuple[int, pb.WatchEvent]] = []
        if scope.include_operations:
            size = 0
            rows = await self._store.finished_operations(scope, after, up_to, rows_limit)
            for row in rows:
                operation = await operation_message(row, self._payloads)
                found.append((row.cursor or 0, pb.WatchEvent(operation=operation)))
                size += operation.ByteSize()
                if size >= page_bytes:
                    break
            if found and (len(found) < len(rows) or len(rows) == rows_limit):
                up_to = found[-1][0]  # there may be more behind it
        if scope.include_metrics:
            if coalesced is not None:
                metrics = [item for item in coalesced if after < item.cursor <= up_to]
            else:
                metrics = await self._store.step_metrics(scope, after, up_to, _PAGE_EVENTS)
                if len(metrics) == _PAGE_EVENTS:
                    up_to = metrics[-1].cursor
            found += [(item.cursor, pb.WatchEvent(metrics=item)) for item in metrics]
        found.sort(key=lambda pair: pair[0])
        return [event for cursor, event in found if cursor <= up_to], up_to


def _matches(scope: EventScope, event: Event) -> bool:
    if scope.run_id is not None and event.run_id != scope.run_id:
        return False
    if event.is_metrics:
        return scope.include_metrics
    if not scope.include_operations:
        return False
    return scope.session_id is None or event.session_id == scope.session_id
