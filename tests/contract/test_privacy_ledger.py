"""What every `Store` must do for the privacy ledger."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe_server.store import migrations
from tensafe_server.store.base import (
    Finish,
    OperationRow,
    RunRow,
    RunUpdate,
    SnapshotRow,
    Store,
    TenantRow,
)
from tensafe_server.store.charges import (
    GENESIS,
    ChargeEnd,
    LedgerEvent,
    LedgerRow,
    Reservation,
    first_break,
)
from tensafe_server.store.sqlite import SqliteStore


def run_test(path: Path, body: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = await SqliteStore.open(path)
        try:
            if not await store.tenants():
                await store.add_tenant(TenantRow("ten-1", "a", 1))
                await store.add_tenant(TenantRow("ten-2", "b", 1))
                await store.add_run(RunRow("run-1", "ten-1", "m", b"", 1, 0, 0, None, 0, 1))
            await body(store)
        finally:
            await store.close()

    asyncio.run(main())


def reservation(number: int, **changes: object) -> Reservation:
    made = Reservation("ten-1", "ds-1", f"chg-{number}", "run-1", f"op-{number}", 1, "line", 7)
    return replace(made, **changes)  # type: ignore[arg-type]


def operation(number: int) -> OperationRow:
    return OperationRow(
        id=f"op-{number}",
        tenant_id="ten-1",
        run_id="run-1",
        seq=number,
        request_id=None,
        session_id="s",
        kind=ops.OPERATION_KIND_OPTIM_STEP,
        state=ops.OPERATION_STATE_QUEUED,
        executed=False,
        spec_hash=b"h",
        spec=b"s",
        spec_ref=None,
        artifact_id=None,
        cost=1.0,
        created_ns=1,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_entries_are_numbered_chained_and_there_after_reopening(path: Path):
    async def write(store: Store) -> None:
        first = await store.reserve_charge(reservation(1))
        second = await store.reserve_charge(reservation(2))
        assert first is not None
        assert second is not None
        await store.end_charges(
            [ChargeEnd(first, LedgerEvent.COMMIT, 8), ChargeEnd(second, LedgerEvent.RELEASE, 9)]
        )
        third = await store.reserve_charge(reservation(3, line="other"))
        assert third is not None
        await store.end_charges([ChargeEnd(third, LedgerEvent.LOSE, 10)])

    async def read(store: Store) -> None:
        rows = await store.ledger("ten-1", "ds-1")
        assert [(row.position, row.event, row.uses) for row in rows] == [
            (1, "reserve", 1),
            (2, "reserve", 2),
            (3, "commit", 2),
            (4, "release", 1),
            (5, "reserve", 1),
            (6, "lose", 1),
        ]
        assert first_break(rows) is None
        assert await store.ledger("ten-1", "ds-1", 2, 1) == rows[2:3]
        assert await store.ledger("ten-2", "ds-1") == []
        assert await store.ledger("ten-1", "ds-2") == []

    run_test(path, write)
    run_test(path, read)


def test_each_dataset_of_each_tenant_has_a_chain_of_its_own(path: Path):
    async def body(store: Store) -> None:
        for number, (tenant, dataset) in enumerate(
            [("ten-1", "ds-1"), ("ten-2", "ds-1"), ("ten-1", "ds-2")]
        ):
            row = await store.reserve_charge(
                reservation(number, tenant_id=tenant, dataset_id=dataset)
            )
            assert row is not None
            assert (row.position, row.uses) == (1, 1)

    run_test(path, body)


def test_the_last_use_goes_to_one_of_those_who_want_it(path: Path):
    async def body(store: Store) -> None:
        made = await asyncio.gather(
            *(store.reserve_charge(reservation(n, at_most=3)) for n in range(8))
        )
        assert [row is not None for row in made] == [True] * 3 + [False] * 5
        rows = await store.ledger("ten-1", "ds-1")
        assert len(rows) == 3
        await store.end_charges([ChargeEnd(rows[0], LedgerEvent.RELEASE, 1)])
        assert await store.reserve_charge(reservation(9, at_most=3)) is not None
        assert await store.reserve_charge(reservation(10, at_most=3)) is None
        assert await store.reserve_charge(reservation(11, line="other", at_most=1)) is not None

    run_test(path, body)


def test_no_entry_can_be_changed_or_taken_out(path: Path):
    async def body(store: Store) -> None:
        await store.reserve_charge(reservation(1))

    run_test(path, body)
    connection = sqlite3.connect(path)
    for statement in (
        "UPDATE dp_ledger SET uses = 0",
        "DELETE FROM dp_ledger",
        "INSERT OR REPLACE INTO dp_ledger SELECT * FROM dp_ledger",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)


def test_a_change_behind_the_stores_back_breaks_the_chain(path: Path):
    async def write(store: Store) -> None:
        for number in range(1, 6):
            await store.reserve_charge(reservation(number))

    async def read(store: Store) -> None:
        rows = await store.ledger("ten-1", "ds-1")
        assert first_break(rows) is None
        for at in range(5):
            for change in ({"line": "cheaper"}, {"uses": 0}, {"event": "release"}):
                forged = [*rows[:at], replace(rows[at], **change), *rows[at + 1 :]]
                assert first_break(forged) == at + 1
            assert first_break(rows[:at] + rows[at + 1 :]) == (at + 1 if at < 4 else None)
        # The newest entry's sum covers all, so that whoever has it sees that the end is missing.
        resealed = replace(rows[0], uses=0).sealed("0" * 64)
        assert first_break([resealed, *rows[1:]]) == 2

    run_test(path, write)
    run_test(path, read)


def test_the_end_of_an_older_stores_ledger_is_known(path: Path, tmp_path: Path):
    """One that was written before ends were noted."""
    older = tmp_path / "migrations"
    older.mkdir()
    for script in sorted(Path(migrations.__file__).parent.glob("*.sql"))[:6]:
        shutil.copy(script, older)
    connection = sqlite3.connect(path, isolation_level=None)
    migrations.migrate(connection, older)
    connection.execute("INSERT INTO tenants (id, name, created_ns) VALUES ('ten-1', 'a', 1)")
    before = GENESIS
    for position in range(1, 4):
        like = LedgerRow("ten-1", "ds-1", position, "reserve", "c", "r", "o", 1, "l", 1, 1, "")
        row = like.sealed(before)
        before = row.sha256
        connection.execute(f"INSERT INTO dp_ledger VALUES ({', '.join('?' * 12)})", astuple(row))
    connection.close()

    async def read(store: Store) -> None:
        record = await store.ledger_record("ten-1", "ds-1")
        assert (len(record.rows), record.first_break()) == (3, None)
        await store.reserve_charge(reservation(1))
        record = await store.ledger_record("ten-1", "ds-1")
        assert (len(record.rows), record.first_break()) == (4, None)

    async def main() -> None:
        store = await SqliteStore.open(path)
        try:
            await read(store)
        finally:
            await store.close()

    asyncio.run(main())


CUTS = {
    "the newest entry": "DELETE FROM dp_ledger WHERE position = 4",
    "all entries": "DELETE FROM dp_ledger",
    "the note of the end": "DELETE FROM dp_heads",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_what_is_cut_off_the_end_is_missed_for_ever(path: Path, cut: str):
    async def write(store: Store) -> None:
        for number in range(1, 5):
            await store.reserve_charge(reservation(number))
        assert (await store.ledger_record("ten-1", "ds-1")).first_break() is None
        assert (await store.ledger_record("ten-1", "ds-2")).first_break() is None

    async def read(store: Store) -> None:
        assert (await store.ledger_record("ten-1", "ds-1")).first_break() is not None
        # Nor does what is written behind it hide that.
        await store.reserve_charge(reservation(5))
        await store.reserve_charge(reservation(6))
        assert (await store.ledger_record("ten-1", "ds-1")).first_break() is not None

    run_test(path, write)
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER dp_ledger_is_never_cut")
    connection.execute(cut)
    connection.commit()
    connection.close()
    run_test(path, read)


def test_outcome_charge_and_snapshot_are_committed_together(path: Path):
    async def body(store: Store) -> None:
        await store.add_operations([operation(1), operation(2)])
        reserved = await store.reserve_charge(reservation(1))
        assert reserved is not None
        await store.reserve_charge(reservation(2))
        await store.add_snapshot(SnapshotRow("snap-1", "run-1", 1, 1, 1, 10, "sum", 5, "chg-1"))
        assert await store.snapshots("run-1") == []
        assert await store.snapshot("snap-1") is None
        assert await store.newest_snapshots() == {}
        assert [row.id for row in await store.staged_snapshots()] == ["snap-1"]
        assert "snapshots/snap-1" in await store.blob_references()
        assert [row.charge_id for row in await store.open_charges()] == ["chg-1", "chg-2"]
        ended = operation(1)
        ended.state, ended.executed, ended.cursor = ops.OPERATION_STATE_SUCCEEDED, True, 1
        await store.finish(
            Finish(
                [ended],
                runs=[RunUpdate("run-1", 1, None, 0, released_seq=1)],
                charges=[ChargeEnd(reserved, LedgerEvent.COMMIT, 6)],
                snapshots=["snap-1"],
            )
        )
        assert [row.id for row in await store.snapshots("run-1")] == ["snap-1"]
        assert await store.newest_snapshots() == {"run-1": 1}
        assert await store.staged_snapshots() == []
        [run] = await store.runs()
        assert run.released_seq == 1
        assert [row.charge_id for row in await store.open_charges()] == ["chg-2"]
        [_, _, committed] = await store.ledger("ten-1", "ds-1")
        assert (committed.event, committed.charge_id) == ("commit", "chg-1")

    run_test(path, body)


def test_a_lost_charge_of_an_operation_that_goes_on_is_no_longer_open(path: Path):
    async def body(store: Store) -> None:
        await store.add_operations([operation(1)])
        first = await store.reserve_charge(reservation(1))
        assert first is not None
        await store.end_charges([ChargeEnd(first, LedgerEvent.LOSE, 2)])
        second = await store.reserve_charge(reservation(2, operation_id="op-1"))
        assert await store.open_charges() == [second]

    run_test(path, body)


def test_uses_of_units_are_counted_with_their_charge(path: Path):
    async def body(store: Store) -> None:
        one, two = b"1" * 16, b"2" * 16
        first = await store.reserve_charge(reservation(1, units=[one, two], max_uses=2))
        assert first is not None
        await store.reserve_charge(reservation(2, units=[one], max_uses=2))
        assert await store.unit_uses("run-1", [one, two, b"3"]) == {one: 2, two: 1}
        assert await store.unit_uses("run-2", [one]) == {}
        await store.end_charges([ChargeEnd(first, LedgerEvent.RELEASE, 9, [one, two])])
        assert await store.unit_uses("run-1", [one, two]) == {one: 1, two: 0}
        refused = await store.reserve_charge(reservation(3, units=[one], max_uses=2, at_most=1))
        assert refused is None
        assert await store.unit_uses("run-1", [one]) == {one: 1}
        many = [n.to_bytes(16) for n in range(25_000)]
        await store.reserve_charge(reservation(4, units=many, max_uses=1))
        assert len(await store.unit_uses("run-1", many)) == 25_000

    run_test(path, body)


def test_a_secret_is_drawn_once(path: Path):
    async def first(store: Store) -> None:
        assert await store.secret("key", b"first") == b"first"

    async def second(store: Store) -> None:
        assert await store.secret("key", b"second") == b"first"

    run_test(path, first)
    run_test(path, second)
