"""The store's schema from its first version on: upgraded whole, or left as it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1.artifacts_pb2 import Artifact
from tensafe.v1.training_pb2 import OperationSpec
from tensafe_server.store import migrations
from tensafe_server.store.base import RunRow, SchemaTooNewError
from tensafe_server.store.migrations import migrate, schema_version
from tensafe_server.store.sqlite import SqliteStore

SCRIPTS = sorted(Path(migrations.__file__).parent.glob("*.sql"))
NEWEST = len(SCRIPTS)

FIRST_VERSION_ROWS = """
INSERT INTO tenants VALUES ('ten-1', 'research', 5);
INSERT INTO runs VALUES ('run-1', 'ten-1', 'tiny', x'0a0474696e79', 1, 2, 3, 'art-1', 4, 6);
INSERT INTO operations VALUES ('op-1', 'ten-1', 'run-1', 1, NULL, 's', 2, 3, 1, x'aa', x'bb', NULL,
  NULL, x'cc', NULL, NULL, 1.5, 7, 8, 0.5, 2.5, 1);
INSERT INTO operations VALUES ('op-2', 'ten-1', 'run-1', 2, NULL, 's', 3, 1, 0, x'aa', x'bb', NULL,
  NULL, NULL, NULL, NULL, 1.5, 9, NULL, NULL, NULL, NULL);
INSERT INTO meta VALUES ('schema_version', '1');
"""


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A store as the first version of TenSafe left it, with data."""
    path = tmp_path / "store.db"
    connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SCRIPTS[0].read_text() + FIRST_VERSION_ROWS)
    connection.close()
    return path


def test_a_store_of_the_first_version_opens_with_its_data(first_version: Path):
    async def read() -> None:
        store = await SqliteStore.open(first_version)
        try:
            assert await store.runs() == [
                RunRow("run-1", "ten-1", "tiny", b"\n\x04tiny", 1, 2, 3, "art-1", 4, 6)
            ]
            row = await store.operation("ten-1", "op-1")
            assert row is not None
            assert (row.spec, row.result, row.cost, row.cursor) == (b"\xbb", b"\xcc", 1.5, 1)
            assert [row.id for row in await store.unfinished()] == ["op-2"]
        finally:
            await store.close()

    asyncio.run(read())
    assert schema_version(connect(first_version)) == NEWEST


def test_times_to_live_outlive_the_upgrade(first_version: Path):
    """More of them than are read at once."""
    timed, untimed = OperationSpec(run_id="run-1"), OperationSpec(run_id="run-1")
    timed.time_to_live.FromNanoseconds(70)
    ending, lasting = Artifact(id="art-1"), Artifact(id="art-2")
    ending.expires_at.FromNanoseconds(80)
    connection = connect(first_version)
    for number in range(600):
        spec = (untimed if number % 2 else timed).SerializeToString()
        state = ops.OPERATION_STATE_QUEUED if number < 500 else ops.OPERATION_STATE_SUCCEEDED
        connection.execute(
            "INSERT INTO operations (id, tenant_id, session_id, kind, state, executed, spec_hash,"
            " spec, cost, created_ns) VALUES (?, 'ten-1', '', 2, ?, 0, x'aa', ?, 1, 5)",
            (f"more-{number}", state, spec),
        )
        body = (lasting if number % 2 else ending).SerializeToString()
        connection.execute(
            "INSERT INTO artifacts VALUES (?, 'ten-1', 'run-1', 1, ?, 5)", (f"art-{number}", body)
        )
    migrate(connection)

    def values(query: str) -> list[int | None]:
        return [value for (value,) in connection.execute(query)]

    deadlines = values("SELECT deadline_ns FROM operations WHERE id LIKE 'more-%' ORDER BY rowid")
    assert deadlines == [75, None] * 250 + [None] * 100
    assert values("SELECT expires_ns FROM artifacts ORDER BY rowid") == [80, None] * 300
    assert values("SELECT deadline_ns FROM operations WHERE id = 'op-2'") == [None]


def test_an_upgraded_store_and_a_new_one_are_alike(first_version: Path, tmp_path: Path):
    fresh = connect(tmp_path / "fresh.db")
    old = connect(first_version)
    assert migrate(fresh) == (0, NEWEST)
    assert migrate(old) == (1, NEWEST)
    assert migrate(old) == (NEWEST, NEWEST)
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    assert old.execute(query).fetchall() == fresh.execute(query).fetchall()


def test_a_newer_schema_is_refused_and_left_alone(first_version: Path):
    connection = connect(first_version)
    migrate(connection)
    connection.execute("UPDATE meta SET value = ?", (str(NEWEST + 1),))
    connection.close()
    before = first_version.read_bytes()
    with pytest.raises(
        SchemaTooNewError, match=rf"schema {NEWEST + 1}.* up to {NEWEST}; .*newer one"
    ):
        asyncio.run(SqliteStore.open(first_version))
    connection = connect(first_version)
    assert schema_version(connection) == NEWEST + 1
    connection.close()
    assert first_version.read_bytes() == before


def test_a_newer_schema_ends_the_command_with_an_error(tmp_path: Path):
    connection = connect(tmp_path / "tensafe.db")
    migrate(connection)
    connection.execute("UPDATE meta SET value = '99'")
    connection.close()
    ran = subprocess.run(
        [sys.executable, "-m", "tensafe_client.cli", "server", "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert "Error: the store has schema 99" in ran.stderr
    assert "Traceback" not in ran.stderr


def with_next(tmp_path: Path, script: str) -> Path:
    """The migrations, and one more."""
    directory = tmp_path / "migrations"
    directory.mkdir()
    for path in SCRIPTS:
        shutil.copy(path, directory)
    (directory / f"{NEWEST + 1:04}_next.sql").write_text(script)
    return directory


def test_a_migration_that_fails_leaves_the_version_before_it(first_version: Path, tmp_path: Path):
    script = "ALTER TABLE runs ADD COLUMN extra TEXT;\nUPDATE runs SET nothing = 1;\n"
    connection = connect(first_version)
    with pytest.raises(sqlite3.OperationalError, match="nothing"):
        migrate(connection, with_next(tmp_path, script))
    assert schema_version(connection) == NEWEST
    assert "extra" not in {row[1] for row in connection.execute("PRAGMA table_info(runs)")}
    assert connection.execute("SELECT step FROM runs").fetchone() == (2,)


_DIE = """
import os, signal, sqlite3, sys
from pathlib import Path
from tensafe_server.store.migrations import migrate
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
migrate(connection, Path(sys.argv[2]))
"""


def test_a_crash_in_a_migration_leaves_the_version_before_it(first_version: Path, tmp_path: Path):
    script = (
        "ALTER TABLE runs ADD COLUMN extra TEXT;\nUPDATE runs SET step = 99;\nSELECT die();\n"
        "CREATE TABLE never (id TEXT);\n"
    )
    directory = with_next(tmp_path, script)
    died = subprocess.run(
        [sys.executable, "-c", _DIE, str(first_version), str(directory)],
        env=dict(os.environ),
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    connection = connect(first_version)
    assert schema_version(connection) == NEWEST
    assert connection.execute("SELECT step FROM runs").fetchone() == (2,)
    assert "extra" not in {row[1] for row in connection.execute("PRAGMA table_info(runs)")}
    (directory / f"{NEWEST + 1:04}_next.sql").write_text("CREATE TABLE later (id TEXT);\n")
    assert migrate(connection, directory) == (NEWEST, NEWEST + 1)
    assert connection.execute("SELECT COUNT(*) FROM later").fetchone() == (0,)


def test_a_gap_in_the_numbers_is_a_defect_that_is_told(tmp_path: Path):
    directory = with_next(tmp_path, "CREATE TABLE x (id TEXT);\n")
    (directory / SCRIPTS[1].name).unlink()
    with pytest.raises(RuntimeError, match="without gap"):
        migrate(connect(tmp_path / "store.db"), directory)


def test_a_statement_without_end_is_a_defect_that_is_told(tmp_path: Path):
    directory = with_next(tmp_path, "CREATE TABLE x (id TEXT)\n-- end\n")
    with pytest.raises(RuntimeError, match="has no end"):
        migrate(connect(tmp_path / "store.db"), directory)
