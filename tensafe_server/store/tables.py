"""How the SQLite store reads and writes: rows as dataclasses, one writer, one reader connection."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

from tensafe_server.store.base import Page, RequestRow
from tensafe_server.store.writer import GroupCommitWriter

_T = TypeVar("_T")
_R = TypeVar("_R")


def columns(row: type) -> str:
    """The columns of a table whose rows these are."""
    return ", ".join(field.name for field in fields(row))


class SqliteTables:
    """Reads on one connection, writes through the group-committing writer of another."""

    _writer: GroupCommitWriter
    _reading: sqlite3.Connection
    _readers: ThreadPoolExecutor
    _loop: asyncio.AbstractEventLoop

    async def _add(self, sql: str, row: Any, request: RequestRow | None) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute(sql, row_values(row))
            if request is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", row_values(request)
                )

        await self._writer.submit(write)

    def _write(
        self,
        sql: str,
        values: Sequence[Sequence[Any]],
        then: Callable[[], None] | None = None,
        *,
        insist: bool = False,
    ) -> asyncio.Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            connection.executemany(sql, values)

        return self._writer.submit(write, then, insist=insist)

    async def _execute(self, sql: str, values: Sequence[Any]) -> None:
        await self._write(sql, [values])

    async def _read(self, read: Callable[[sqlite3.Connection], _T]) -> _T:
        return await self._loop.run_in_executor(self._readers, read, self._reading)

    async def _select(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return await self._read(lambda connection: connection.execute(sql, values).fetchall())

    async def _rows(self, row: type[_R], source: str, values: Sequence[Any] = ()) -> list[_R]:
        rows = await self._select(f"SELECT {columns(row)} FROM {source}", values)  # noqa: S608
        return [row(*values) for values in rows]

    async def _one(self, row: type[_R], source: str, values: Sequence[Any]) -> _R | None:
        rows = await self._rows(row, source, values)
        return rows[0] if rows else None

    async def _page(
        self, row: type[_R], table: str, where: str, values: Sequence[Any], page: Page
    ) -> list[tuple[int, _R]]:
        rows = await self._select(
            f"SELECT rowid, {columns(row)} FROM {table} WHERE {where} AND rowid < ?"  # noqa: S608
            " ORDER BY rowid DESC LIMIT ?",
            (*values, before_row(page), page.size),
        )
        return [(first, row(*rest)) for first, *rest in rows]


def row_values(row: Any) -> tuple[Any, ...]:
    return tuple(getattr(row, field.name) for field in fields(row))


def where_clause(**conditions: str | None) -> tuple[str, list[Any]]:
    given = {name: value for name, value in conditions.items() if value is not None}
    return " AND ".join(f"{name} = ?" for name in given), list(given.values())


def before_row(page: Page) -> int:
    return page.before if page.before is not None else 2**62
