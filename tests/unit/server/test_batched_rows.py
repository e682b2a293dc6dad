"""Many rows in one statement are what they are one by one."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_server.store.batched import insert_rows, update_rows

_COLUMNS = "id, text, body, number"
_CHANGES = "text, number, id"
_TEXT = st.text(max_size=4) | st.none()
_ROWS = st.lists(st.tuples(_TEXT, st.binary(max_size=4), st.integers(-9, 9)), max_size=200)


def _table() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, text TEXT, body, number)")
    return connection


def _content(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    return connection.execute(f"SELECT {_COLUMNS} FROM things ORDER BY id").fetchall()


@given(_ROWS)
def test_rows_are_inserted_in_one_go_as_they_are(rows: list[tuple[object, ...]]) -> None:
    numbered = [(place, *row) for place, row in enumerate(rows)]
    connection = _table()
    insert_rows(connection, "things", _COLUMNS, numbered)
    assert _content(connection) == numbered


@given(_ROWS, st.data())
def test_rows_are_updated_by_their_id_and_no_others(
    rows: list[tuple[object, ...]], data: st.DataObject
) -> None:
    numbered = [(place, *row) for place, row in enumerate(rows)]
    ids = st.lists(st.integers(0, 250), unique=True, max_size=150)
    changes = [(data.draw(_TEXT), place * 2, place) for place in data.draw(ids)]
    together, singly = _table(), _table()
    insert_rows(together, "things", _COLUMNS, numbered)
    insert_rows(singly, "things", _COLUMNS, numbered)
    update_rows(together, "things", _CHANGES, changes)
    singly.executemany("UPDATE things SET text = ?, number = ? WHERE id = ?", changes)
    assert _content(together) == _content(singly)


def test_a_bad_row_keeps_all_of_its_statement_out() -> None:
    connection = _table()
    with pytest.raises(sqlite3.IntegrityError):
        insert_rows(connection, "things", "id, text", [(1, "a"), (1, "b")])
    assert _content(connection) == []
