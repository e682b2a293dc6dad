"""What worker processes were at, in the SQLite store."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence

from tensafe_server.store.base import AttemptRow
from tensafe_server.store.tables import SqliteTables, row_values

_REMOVE = "DELETE FROM attempts WHERE subject = ?"


def end_attempts(connection: sqlite3.Connection, subjects: Sequence[str]) -> None:
    """Takes out the attempts at what has ended, inside a transaction."""
    connection.executemany(_REMOVE, [(subject,) for subject in subjects])


class SqliteAttempts(SqliteTables):
    """What concerns attempts. There are few, so that no second index is needed."""

    def add_attempts(self, rows: Sequence[AttemptRow]) -> asyncio.Future[None]:
        """Adds or replaces."""
        values = [row_values(row) for row in rows]
        return self._write("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?)", values, insist=True)

    def remove_attempts(self, subject: str) -> asyncio.Future[None]:
        """The operation or run has come through."""
        return self._write(_REMOVE, [(subject,)], insist=True)

    def remove_attempts_by(self, worker: str) -> asyncio.Future[None]:
        """The process was not lost."""
        return self._write("DELETE FROM attempts WHERE worker = ?", [(worker,)], insist=True)

    async def attempts(self) -> list[AttemptRow]:
        rows = await self._select("SELECT subject, worker, running FROM attempts")
        return [AttemptRow(subject, worker, bool(running)) for subject, worker, running in rows]
