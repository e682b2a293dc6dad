"""What every `Store` must do."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe.v1.metrics_pb2 import StepMetrics
from tensafe_server.store.base import (
    AttemptRow,
    EventScope,
    Finish,
    OperationRow,
    Page,
    RequestRow,
    RunRow,
    RunUpdate,
    Store,
    TenantRow,
)
from tensafe_server.store.sqlite import SqliteStore

FINISHED = ops.OPERATION_STATE_SUCCEEDED
QUEUED = ops.OPERATION_STATE_QUEUED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = await SqliteStore.open(path)
    try:
        yield store
    finally:
        await store.close()


def run_test(path: Path, body: Callable[[Store], object]) -> None:
    async def main() -> None:
        async with opened(path) as store:
            await body(store)  # type: ignore[misc]

    asyncio.run(main())


def operation(number: int, *, run: str | None = "run-1", tenant: str = "ten-1") -> OperationRow:
    return OperationRow(
        id=f"op-{tenant}-{run}-{number}",
        tenant_id=tenant,
        run_id=run,
        seq=number if run else None,
        request_id=None if run else f"request-{number}",
        session_id="session",
        kind=ops.OPERATION_KIND_OPTIM_STEP,
        state=QUEUED,
        executed=False,
        spec_hash=b"hash",
        spec=b"spec",
        spec_ref=None,
        artifact_id=None,
        cost=1.0,
        created_ns=number,
    )


def finished(row: OperationRow, cursor: int) -> OperationRow:
    row.state, row.executed, row.cursor, row.finished_ns = FINISHED, True, cursor, 1
    row.result = b"result"
    return row


async def with_run(store: Store, run: str = "run-1", tenant: str = "ten-1") -> None:
    await store.add_tenant(TenantRow(tenant, tenant, 1))
    await store.add_run(RunRow(run, tenant, "m", b"", 1, 0, 0, None, 0, 1))


def test_what_was_written_is_there_after_reopening(path: Path):
    async def write(store: Store) -> None:
        await with_run(store)
        await store.add_operations([operation(1), operation(2)])
        await store.finish(
            Finish(
                [finished(operation(1), 7)],
                [("ten-1", StepMetrics(cursor=8, run_id="run-1", step=1))],
                [("ten-1", Artifact(id="art-1", run_id="run-1", step=1))],
                [RunUpdate("run-1", 1, "art-1", 1)],
            )
        )

    async def read(store: Store) -> None:
        row = await store.operation("ten-1", "op-ten-1-run-1-1")
        assert row is not None
        assert (row.state, row.result, row.cursor) == (FINISHED, b"result", 7)
        assert [row.seq for row in await store.unfinished()] == [2]
        assert await store.last_cursor() == 8
        [run] = await store.runs()
        assert (run.step, run.base_artifact_id, run.base_seq) == (1, "art-1", 1)
        artifact = await store.artifact("ten-1", "art-1")
        assert artifact is not None
        assert artifact.step == 1

    run_test(path, write)
    run_test(path, read)


def test_what_has_ended_is_read_without_what_it_was_to_do_if_asked(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        await store.add_operations([operation(1), operation(2), operation(3)])
        await store.finish(Finish([finished(operation(1), 7), finished(operation(3), 8)]))
        whole = await store.history("run-1", 0, 10)
        assert [(row.seq, row.spec) for row in whole] == [(1, b"spec"), (3, b"spec")]
        lean = await store.history("run-1", 0, 10, with_specs=False)
        assert [(row.seq, row.spec) for row in lean] == [(1, None), (3, None)]
        assert [replace(row, spec=b"spec") for row in lean] == list(whole)
        assert [row.seq for row in await store.history("run-1", 1, 10, with_specs=False)] == [3]

    run_test(path, body)


def test_a_foreign_row_and_a_missing_row_are_the_same(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        await store.add_operations([operation(1)])
        await store.finish(Finish([], artifacts=[("ten-1", Artifact(id="art-1", run_id="run-1"))]))
        assert await store.operation("ten-2", "op-ten-1-run-1-1") is None
        assert await store.operation("ten-2", "op-none") is None
        assert await store.artifact("ten-2", "art-1") is None
        assert await store.operations("ten-2", "run-1", [], Page(10)) == []
        assert await store.artifacts("ten-2", None, Page(10), 1) == []

    run_test(path, body)


def test_coalesced_metrics_are_few_and_say_what_they_leave_out(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        await with_run(store, "run-2", "ten-2")
        await store.add_run(RunRow("run-3", "ten-1", "m", b"", 1, 0, 0, None, 0, 1))
        steps = [("run-1", step) for step in range(1, 101)] + [("run-3", 1), ("run-3", 2)]
        metrics = [
            ("ten-1", StepMetrics(cursor=10 + number, run_id=run, step=step))
            for number, (run, step) in enumerate(steps)
        ]
        metrics.append(("ten-2", StepMetrics(cursor=200, run_id="run-2", step=1)))
        await store.finish(Finish([], metrics=metrics))

        async def read(scope: EventScope, most: int, after: int = 0, up_to: int = 1000):
            found = await store.coalesced_metrics(scope, after, up_to, most)
            return [(item.run_id, item.step, item.skipped) for item in found]

        everything = [("run-1", step, 0) for step in range(1, 101)]
        alone = EventScope("ten-1", run_id="run-1")
        assert await read(alone, 100) == everything
        assert await read(alone, 99) == [("run-1", step, 1) for step in range(2, 101, 2)]
        assert await read(alone, 3) == [("run-1", 32, 31), ("run-1", 66, 33), ("run-1", 100, 33)]
        assert await read(alone, 3, after=109 - 4, up_to=109) == [
            ("run-1", 98, 1),
            ("run-1", 100, 1),
        ]
        assert await read(alone, 1, after=109) == []
        both = await read(EventScope("ten-1"), 2)  # one in 51, and each run's newest
        assert both == [("run-1", 49, 48), ("run-1", 100, 50), ("run-3", 2, 1)]
        assert await read(EventScope("ten-2", run_id="run-1"), 3) == []

    run_test(path, body)


def test_attempts_stay_until_what_they_are_at_ends(path: Path):
    rows = [operation(number) for number in (1, 2, 3)]

    async def write(store: Store) -> None:
        await with_run(store)
        await store.add_operations(rows)
        await store.add_attempts(
            [AttemptRow(row.id, worker, True) for row in rows for worker in ("one", "two")]
        )
        await store.add_attempts(
            [AttemptRow(rows[2].id, "one", False), AttemptRow("run-1", "two", False)]
        )
        store.remove_attempts_by("two")
        await store.finish(Finish([finished(rows[0], 1)], attempted=[rows[0].id]))

    async def read(store: Store) -> None:
        assert set(await store.attempts()) == {
            AttemptRow(rows[1].id, "one", True),
            AttemptRow(rows[2].id, "one", False),
        }
        await store.remove_attempts(rows[1].id)
        assert [row.subject for row in await store.attempts()] == [rows[2].id]

    run_test(path, write)
    run_test(path, read)


def test_a_seq_is_unique_and_a_failed_write_leaves_the_others(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        first = store.add_operations([operation(1)])
        twice = store.add_operations([operation(1)])
        second = store.add_operations([operation(2)])
        await first
        await second
        with pytest.raises(sqlite3.IntegrityError):
            await twice
        assert len(await store.unfinished()) == 2

    run_test(path, body)


def test_gaps_in_a_runs_order_are_found(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        await store.add_operations([operation(n) for n in (1, 2, 5, 7)])
        await store.finish(Finish([finished(operation(1), 1)]))
        progress = (await store.run_progress())["run-1"]
        assert progress.max_seq == 7
        assert list(progress.gaps) == [3, 4, 6]
        assert progress.last_executed_seq == 1

    run_test(path, body)


def test_events_come_in_order_and_by_scope(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        rows = [operation(n) for n in range(1, 6)]
        rows[3].session_id = "other"
        await store.add_operations(rows)
        await store.finish(Finish([finished(row, 10 + index) for index, row in enumerate(rows)]))
        mine = EventScope("ten-1", session_id="session")
        found = await store.finished_operations(mine, 10, 14, 10)
        assert [row.cursor for row in found] == [11, 12, 14]
        assert await store.finished_operations(EventScope("ten-2"), 0, 99, 10) == []
        limited = await store.finished_operations(EventScope("ten-1"), 0, 99, 2)
        assert [row.cursor for row in limited] == [10, 11]

    run_test(path, body)


def test_pages_go_from_new_to_old_without_gap(path: Path):
    async def body(store: Store) -> None:
        await with_run(store)
        await store.add_operations([operation(n) for n in range(1, 8)])
        seen, before = [], None
        while rows := await store.operations("ten-1", "run-1", [QUEUED], Page(3, before)):
            seen += [row.seq for _, row in rows]
            before = rows[-1][0]
        assert seen == [7, 6, 5, 4, 3, 2, 1]

    run_test(path, body)


def test_a_request_is_remembered_with_what_it_made(path: Path):
    async def body(store: Store) -> None:
        request = RequestRow("ten-1", "request-1", b"hash", "run-1")
        await store.add_tenant(TenantRow("ten-1", "a", 1))
        await store.add_run(RunRow("run-1", "ten-1", "m", b"", 1, 0, 0, None, 0, 1), request)
        assert await store.request("ten-1", "request-1") == request
        assert await store.request("ten-2", "request-1") is None

    run_test(path, body)
