"""What happens to writes while the disk does not take them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tensafe.wire.status import TenSafeFault
from tensafe_server.store.writer import GroupCommitWriter

Body = Callable[[GroupCommitWriter, sqlite3.Connection], Awaitable[None]]


def with_writer(path: Path, body: Body) -> list[int]:
    """Runs a test on a writer of its own; returns what is in the table at the end."""

    async def main() -> list[int]:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("CREATE TABLE numbers (number INTEGER UNIQUE)")
        writer = GroupCommitWriter(connection, asyncio.get_running_loop())
        try:
            await body(writer, connection)
        finally:
            await asyncio.to_thread(writer.close)
        await asyncio.sleep(0)  # what close has told is on its way to the loop
        return [number for (number,) in connection.execute("SELECT number FROM numbers")]

    return asyncio.run(main())


def insert(number: int) -> Callable[[sqlite3.Connection], None]:
    return lambda connection: connection.execute("INSERT INTO numbers VALUES (?)", (number,))


def test_what_insists_waits_in_order_and_the_rest_is_refused(tmp_path: Path):
    told: list[int] = []

    async def body(writer: GroupCommitWriter, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA query_only = ON")  # SQLITE_READONLY, as on a read-only disk
        first = writer.submit(insert(1), lambda: told.append(1), insist=True)
        refused = [writer.submit(insert(2))]
        second = writer.submit(insert(3), lambda: told.append(3), insist=True)
        with pytest.raises(TenSafeFault, match="read-only") as caught:
            await refused[0]
        assert caught.value.detail.reason == "STORAGE_UNAVAILABLE"
        assert caught.value.detail.retry_delay_s
        refused.append(writer.submit(insert(4)))
        with pytest.raises(TenSafeFault):
            await refused[1]
        assert not first.done()
        connection.execute("PRAGMA query_only = OFF")
        await asyncio.gather(first, second, writer.submit(insert(5)))

    assert with_writer(tmp_path / "db", body) == [1, 3, 5]
    assert told == [1, 3]


def test_a_write_that_can_never_succeed_fails_alone(tmp_path: Path):
    async def body(writer: GroupCommitWriter, _: sqlite3.Connection) -> None:
        numbers = (1, 2, 1, 3)
        writes = [writer.submit(insert(number), insist=True) for number in numbers]
        ended = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(end) for end in ended if end is not None] == [sqlite3.IntegrityError]

    assert with_writer(tmp_path / "db", body) == [1, 2, 3]


def test_closing_does_not_wait_for_the_disk(tmp_path: Path):
    waiting: list[asyncio.Future[None]] = []

    async def body(writer: GroupCommitWriter, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA query_only = ON")
        waiting.append(writer.submit(insert(1), insist=True))
        with pytest.raises(TenSafeFault):
            await writer.submit(insert(2))

    assert with_writer(tmp_path / "db", body) == []
    assert isinstance(waiting[0].exception(), TenSafeFault)


def test_what_follows_one_write_keeps_nobody_else_from_being_told(tmp_path: Path, caplog):
    told: list[int] = []

    def fail() -> None:
        raise ValueError("nobody knows why")

    async def body(writer: GroupCommitWriter, connection: sqlite3.Connection) -> None:
        writes = [writer.submit(insert(1), fail), writer.submit(insert(2), lambda: told.append(2))]
        await asyncio.wait_for(asyncio.gather(*writes), 10)

    assert with_writer(tmp_path / "db", body) == [1, 2]
    assert told == [2]
    assert "nobody knows why" in caplog.text
