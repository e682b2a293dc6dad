"""Fan-out: no gap, no repetition, bounded memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.blobs.stub import StubBlobStore
from tensafe_server.events import hub as hub_module
from tensafe_server.events.hub import Event, EventHub
from tensafe_server.operations.model import PendingOperation
from tensafe_server.operations.outcomes import ended_event
from tensafe_server.store.base import EventScope, Finish, OperationRow
from tensafe_server.store.sqlite import SqliteStore

SCOPE = EventScope("ten-1")


def row(number: int, tenant: str = "ten-1") -> OperationRow:
    return OperationRow(
        id=f"op-{number}",
        tenant_id=tenant,
        run_id=None,
        seq=None,
        request_id=None,
        session_id="",
        kind=ops.OPERATION_KIND_SAMPLE,
        state=ops.OPERATION_STATE_SUCCEEDED,
        executed=True,
        spec_hash=b"",
        spec=b"",
        spec_ref=None,
        artifact_id=None,
        cost=1,
        created_ns=1,
    )


async def finish(store: SqliteStore, hub: EventHub, number: int) -> None:
    item = row(number)
    await store.add_operations([item])
    item.cursor = hub.next_cursor()
    await store.finish(Finish([item]))
    hub.publish([ended_event(PendingOperation(item, b"", ""))])


async def make(path: Path) -> tuple[SqliteStore, EventHub]:
    store = await SqliteStore.open(path / "store.db")
    hub = EventHub(store, Payloads(StubBlobStore()))
    await hub.load()
    return store, hub


@pytest.mark.parametrize(("limit", "value"), [("_BUFFER_EVENTS", 3), ("_BUFFER_BYTES", 100)])
def test_a_watcher_that_comes_late_or_falls_behind_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
):
    monkeypatch.setattr(hub_module, limit, value)

    async def main() -> list[str]:
        store, hub = await make(tmp_path)
        for number in range(5):
            await finish(store, hub, number)
        seen: list[str] = []
        stream = hub.stream(SCOPE, 0)
        assert (await anext(stream)) == ([], 0)
        events, _ = await anext(stream)
        seen += [event.operation.id for event in events]
        for number in range(5, 15):  # more than the buffer holds, while nobody reads
            await finish(store, hub, number)
        while len(seen) < 15:
            events, _ = await anext(stream)
            seen += [event.operation.id for event in events]
        await stream.aclose()
        await store.close()
        return seen

    assert asyncio.run(main()) == [f"op-{number}" for number in range(15)]


async def finish_step(store: SqliteStore, hub: EventHub, step: int) -> None:
    """An operation and an update."""
    await finish(store, hub, step)
    item = StepMetrics(cursor=hub.next_cursor(), run_id="run-1", step=step)
    await store.finish(Finish([], metrics=[("ten-1", item)]))
    event = ops.WatchEvent(metrics=item)
    hub.publish([Event(item.cursor, "ten-1", "run-1", "", event, event.ByteSize())])


def test_who_falls_behind_gets_all_operations_and_coalesced_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub_module, "_BUFFER_EVENTS", 8)
    monkeypatch.setattr(hub_module, "_COALESCED_STEPS", 4)
    scope = EventScope("ten-1", include_metrics=True)

    async def main() -> None:
        store, hub = await make(tmp_path)
        for step in range(1, 41):
            await finish_step(store, hub, step)
        seen: list[ops.WatchEvent] = []
        stream = hub.stream(scope, 0)

        async def read_to(step: int) -> None:
            while not any(event.metrics.step == step for event in seen[-1:]):
                seen.extend((await anext(stream))[0])

        await read_to(40)
        steps = [event.metrics for event in seen if event.HasField("metrics")]
        assert [step.step for step in steps] == list(range(1, 41)), "what it asked for"
        for step in range(41, 101):
            await finish_step(store, hub, step)
        seen.clear()
        await read_to(100)
        steps = [event.metrics for event in seen if event.HasField("metrics")]
        assert [(one.step, one.skipped) for one in steps] == [
            (55, 14),
            (70, 14),
            (85, 14),
            (100, 14),
        ]
        operations = [event.operation.id for event in seen if event.HasField("operation")]
        assert operations == [f"op-{step}" for step in range(41, 101)]
        await finish_step(store, hub, 101)
        await read_to(101)
        assert seen[-1].metrics.skipped == 0
        await stream.aclose()
        after = hub.first_cursor + 79  # the 40th
        again = hub.stream(scope, after, follow=False)
        whole = [event async for page, _ in again for event in page if event.HasField("metrics")]
        assert [event.metrics.step for event in whole] == list(range(41, 102))
        assert not any(event.metrics.skipped for event in whole)
        await store.close()

    asyncio.run(main())


def test_a_watcher_resumes_from_its_cursor(tmp_path: Path):
    async def main() -> None:
        store, hub = await make(tmp_path)
        for number in range(3):
            await finish(store, hub, number)
        first = hub.stream(SCOPE, hub.first_cursor)
        await anext(first)
        events, cursor = await anext(first)
        assert [event.operation.id for event in events] == ["op-1", "op-2"]
        assert cursor == hub.first_cursor + 2
        await first.aclose()
        await finish(store, hub, 3)
        again = hub.stream(SCOPE, cursor)
        await anext(again)
        events, _ = await anext(again)
        assert [event.operation.id for event in events] == ["op-3"]
        await again.aclose()
        await store.close()

    asyncio.run(main())


def test_a_stream_without_follow_ends(tmp_path: Path):
    async def main() -> None:
        store, hub = await make(tmp_path)
        await finish(store, hub, 0)
        pages = [page async for page in hub.stream(SCOPE, 0, follow=False)]
        assert [len(events) for events, _ in pages] == [0, 1]
        await store.close()

    asyncio.run(main())


def test_other_tenants_see_nothing(tmp_path: Path):
    async def main() -> None:
        store, hub = await make(tmp_path)
        await finish(store, hub, 0)
        pages = [page async for page in hub.stream(EventScope("ten-2"), 0, follow=False)]
        assert [events for events, _ in pages] == [[]]
        await store.close()

    asyncio.run(main())


def test_a_cursor_from_the_future_is_refused(tmp_path: Path):
    async def main() -> None:
        store, hub = await make(tmp_path)
        with pytest.raises(TenSafeFault) as raised:
            await anext(hub.stream(SCOPE, hub.first_cursor))
        assert raised.value.detail.reason == "CURSOR_OUT_OF_RANGE"
        await store.close()

    asyncio.run(main())


def test_what_a_watcher_leaves_unread_is_bounded_in_bytes():
    async def main() -> None:
        subscription = hub_module.Subscription(SCOPE, 0)
        for number in range(100):
            item = row(number)
            item.cursor = number + 1
            subscription.offer(ended_event(PendingOperation(item, b"", "")), 200)
            largest = max((event.size for event in subscription.events), default=0)
            assert sum(event.size for event in subscription.events) <= 200 + largest
        assert subscription.behind

    asyncio.run(main())


def test_many_watchers_share_what_they_may_hold(tmp_path: Path):
    async def main() -> None:
        store, hub = await make(tmp_path)
        most = hub_module._BUFFER_BYTES
        assert hub._share(most) == most
        streams = [hub.stream(SCOPE, None) for _ in range(1000)]
        for stream in streams:
            await anext(stream)
        assert hub._share(most) * 1000 <= hub_module._ALL_BYTES
        for stream in streams:
            await stream.aclose()
        assert hub._share(most) == most
        await store.close()

    asyncio.run(main())
