"""The store's schema: numbered SQL files, applied in order, each in one transaction."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tensafe import failpoints
from tensafe_server.store.base import SchemaTooNewError
from tensafe_server.store.migrations.fills import FILLS

_DIRECTORY = Path(__file__).parent
_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


def schema_version(connection: sqlite3.Connection) -> int:
    """The number of the last migration that was applied; 0 for an empty file."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return 0
    (version,) = connection.execute(
        "SELECT value FROM meta WHERE key = 'schema_version'"
    ).fetchone()
    return int(version)


def migrate(connection: sqlite3.Connection, directory: Path = _DIRECTORY) -> tuple[int, int]:
    """Brings a store to the newest schema; returns the version that it had, and the newest.

    A crash, or an error, leaves the store at the last version whose script was applied whole.

    Raises:
        SchemaTooNewError: if a newer version of TenSafe wrote it; nothing is changed.
    """
    scripts = _scripts(directory)
    before = schema_version(connection)
    if before > len(scripts):
        raise SchemaTooNewError(
            f"the store has schema {before}, this version of TenSafe knows up to {len(scripts)}; "
            "start the version that wrote it, or a newer one"
        )
    for version, script in enumerate(scripts[before:], before + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in _statements(script.read_text()):
                connection.execute(statement)
            if version in FILLS:
                FILLS[version](connection)
            failpoints.hit("mid-migration")
            connection.execute(
                "INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (str(version),)
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return before, len(scripts)


def _scripts(directory: Path) -> list[Path]:
    scripts = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    numbers = [int(path.name[:4]) for path in scripts]
    if numbers != list(range(1, len(scripts) + 1)):
        raise RuntimeError(f"migrations must be numbered 1, 2, … without gap, found {numbers}")
    return scripts


def _statements(script: str) -> Iterator[str]:
    """The script's statements; `executescript` would commit between them."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if any(line.strip() and not line.strip().startswith("--") for line in statement.splitlines()):
        raise RuntimeError(f"a statement has no end: {statement.strip()!r}")
