"""One statement for many rows.

`executemany` lets go of the interpreter's lock and takes it back at every row, for which it has to
wait while the event loop is busy. A statement that has many rows does so once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

_MOST_ROWS = 64
"""Of one statement: with their columns, far below SQLite's 32,766 parameters."""


def insert_rows(
    connection: sqlite3.Connection, table: str, columns: str, rows: Sequence[Sequence[Any]]
) -> None:
    """Inserts rows that have a value for each of the columns, which are named `a, b, …`."""
    _execute(connection, lambda values: f"INSERT INTO {table} ({columns}) {values}", rows)


def update_rows(
    connection: sqlite3.Connection, table: str, columns: str, rows: Sequence[Sequence[Any]]
) -> None:
    """Updates rows by their `id`, which is the last column."""
    names = columns.split(", ")
    changes = ", ".join(f"{name} = new.{name}" for name in names[:-1])
    _execute(
        connection,
        lambda values: (
            f"WITH new ({columns}) AS ({values}) "  # noqa: S608
            f"UPDATE {table} SET {changes} FROM new WHERE {table}.id = new.id"
        ),
        rows,
    )


def _execute(
    connection: sqlite3.Connection, statement: Callable[[str], str], rows: Sequence[Sequence[Any]]
) -> None:
    begin = 0
    while begin < len(rows):
        # Powers of two, so that few statements are prepared, each once.
        count = min(_MOST_ROWS, 1 << (len(rows) - begin).bit_length() - 1)
        part = rows[begin : begin + count]
        sql = statement(_values(count, len(part[0])))
        connection.execute(sql, list(chain.from_iterable(part)))
        begin += count


@cache
def _values(rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"VALUES {', '.join([row] * rows)}"
