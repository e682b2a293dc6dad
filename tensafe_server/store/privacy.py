"""The privacy ledger in the SQLite store."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import fields

from tensafe import failpoints
from tensafe_server.store.charges import (
    GENESIS,
    ChargeEnd,
    LedgerEvent,
    LedgerRecord,
    LedgerRow,
    Reservation,
)
from tensafe_server.store.tables import SqliteTables, columns, row_values

_INSERT = (
    f"INSERT INTO dp_ledger ({columns(LedgerRow)}) "  # noqa: S608 - names of our own fields
    f"VALUES ({', '.join('?' * len(fields(LedgerRow)))})"
)
_USE_UNIT = """
    INSERT INTO dp_uses VALUES (?, ?, 1)
    ON CONFLICT DO UPDATE SET uses = uses + 1 WHERE uses < ?"""
_GIVE_BACK_UNIT = "UPDATE dp_uses SET uses = uses - 1 WHERE run_id = ? AND unit = ? AND uses > 0"
_OPEN = f"""
    SELECT {columns(LedgerRow)} FROM dp_ledger reserved
    WHERE event = 'reserve' AND operation_id IN
        (SELECT id FROM operations WHERE state IN (1, 2))
      AND NOT EXISTS (SELECT 1 FROM dp_ledger ended
        WHERE ended.operation_id = reserved.operation_id
          AND ended.charge_id = reserved.charge_id AND ended.event != 'reserve')"""  # noqa: S608
_ALL = f"""
    SELECT {columns(LedgerRow)} FROM dp_ledger WHERE tenant_id = ? AND dataset_id = ?
    ORDER BY position"""  # noqa: S608
_END = "SELECT position, sha256 FROM dp_heads WHERE tenant_id = ? AND dataset_id = ?"
_FIRST_END = "INSERT INTO dp_heads VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
_MOVE_END = """
    UPDATE dp_heads SET position = ?, sha256 = ?
    WHERE tenant_id = ? AND dataset_id = ? AND position = ? AND sha256 = ?"""
_UNITS_AT_ONCE = 10_000


class SqlitePrivacy(SqliteTables):
    """What concerns charges and units."""

    async def reserve_charge(self, reservation: Reservation) -> LedgerRow | None:
        """Writes a charge down; None, and nothing is written, if its line has all of its uses."""
        made: list[LedgerRow | None] = []

        def write(connection: sqlite3.Connection) -> None:
            made[:] = [_reserve(connection, reservation)]
            failpoints.hit("mid-charge")

        await self._writer.submit(write)
        return made[0]

    async def end_charges(self, ends: Sequence[ChargeEnd]) -> None:
        """Writes down what became of charges, without an outcome of their operations."""
        await self._writer.submit(lambda connection: write_ends(connection, ends), insist=True)

    async def ledger(
        self, tenant_id: str, dataset_id: str, after: int = 0, limit: int = -1
    ) -> list[LedgerRow]:
        """A dataset's entries in order, from the position after `after`; limit −1: all."""
        return await self._rows(
            LedgerRow,
            "dp_ledger WHERE tenant_id = ? AND dataset_id = ? AND position > ?"
            " ORDER BY position LIMIT ?",
            (tenant_id, dataset_id, after, limit),
        )

    async def ledger_record(self, tenant_id: str, dataset_id: str) -> LedgerRecord:
        """A dataset's entries, and where the ledger ends, as they were at one moment."""

        def read(connection: sqlite3.Connection) -> LedgerRecord:
            key = (tenant_id, dataset_id)
            connection.execute("BEGIN")
            try:
                rows = connection.execute(_ALL, key).fetchall()
                end = connection.execute(_END, key).fetchone()
            finally:
                connection.execute("COMMIT")
            return LedgerRecord([LedgerRow(*row) for row in rows], end)

        return await self._read(read)

    async def open_charges(self) -> list[LedgerRow]:
        """Charges of unfinished operations of which nobody knows yet what became."""
        return [LedgerRow(*row) for row in await self._select(_OPEN)]

    async def unit_uses(self, run_id: str, units: Sequence[bytes]) -> dict[bytes, int]:
        """In how many steps of a run each of these was; those that were in none are left out."""
        found: dict[bytes, int] = {}
        for begin in range(0, len(units), _UNITS_AT_ONCE):
            some = units[begin : begin + _UNITS_AT_ONCE]
            places = ", ".join("?" * len(some))
            found |= dict(
                await self._select(
                    f"SELECT unit, uses FROM dp_uses WHERE run_id = ? AND unit IN ({places})",  # noqa: S608
                    (run_id, *some),
                )
            )
        return found

    async def secret(self, name: str, fresh: bytes) -> bytes:
        """A secret of this store that is drawn once: `fresh`, unless there is one."""
        await self._execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, fresh.hex()))
        rows = await self._select("SELECT value FROM meta WHERE key = ?", (name,))
        return bytes.fromhex(rows[0][0])


def write_ends(connection: sqlite3.Connection, ends: Sequence[ChargeEnd]) -> None:
    """Appends what became of charges, inside a transaction."""
    for end in ends:
        row = end.reserved
        uses = _uses(connection, row.tenant_id, row.dataset_id, row.line)
        if end.event is LedgerEvent.RELEASE:
            uses -= 1
            connection.executemany(_GIVE_BACK_UNIT, [(row.run_id, unit) for unit in end.units])
        _append(connection, row, end.event, uses, end.created_ns)


def _reserve(connection: sqlite3.Connection, wanted: Reservation) -> LedgerRow | None:
    uses = _uses(connection, wanted.tenant_id, wanted.dataset_id, wanted.line)
    if wanted.at_most is not None and uses >= wanted.at_most:
        return None
    connection.executemany(
        _USE_UNIT, [(wanted.run_id, unit, wanted.max_uses) for unit in wanted.units]
    )
    row = LedgerRow(
        tenant_id=wanted.tenant_id,
        dataset_id=wanted.dataset_id,
        position=0,
        event="",
        charge_id=wanted.charge_id,
        run_id=wanted.run_id,
        operation_id=wanted.operation_id,
        epoch=wanted.epoch,
        line=wanted.line,
        uses=0,
        created_ns=0,
        sha256="",
    )
    return _append(connection, row, LedgerEvent.RESERVE, uses + 1, wanted.created_ns)


def _uses(connection: sqlite3.Connection, tenant_id: str, dataset_id: str, line: str) -> int:
    row = connection.execute(
        "SELECT uses FROM dp_ledger WHERE tenant_id = ? AND dataset_id = ? AND line = ?"
        " ORDER BY position DESC LIMIT 1",
        (tenant_id, dataset_id, line),
    ).fetchone()
    return int(row[0]) if row is not None else 0


def _append(
    connection: sqlite3.Connection, like: LedgerRow, event: LedgerEvent, uses: int, created_ns: int
) -> LedgerRow:
    position, before = connection.execute(
        "SELECT position, sha256 FROM dp_ledger WHERE tenant_id = ? AND dataset_id = ?"
        " ORDER BY position DESC LIMIT 1",
        (like.tenant_id, like.dataset_id),
    ).fetchone() or (0, GENESIS)
    row = LedgerRow(
        tenant_id=like.tenant_id,
        dataset_id=like.dataset_id,
        position=position + 1,
        event=event,
        charge_id=like.charge_id,
        run_id=like.run_id,
        operation_id=like.operation_id,
        epoch=like.epoch,
        line=like.line,
        uses=uses,
        created_ns=created_ns,
        sha256="",
    ).sealed(before)
    connection.execute(_INSERT, row_values(row))
    key, end = (row.tenant_id, row.dataset_id), (row.position, row.sha256)
    if position == 0:
        connection.execute(_FIRST_END, (*key, *end))
    else:
        # Not where it is another: then entries are gone, and that is to stay seen.
        connection.execute(_MOVE_END, (*end, *key, position, before))
    return row
