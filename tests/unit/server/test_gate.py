"""The gate: alone at once, under load in groups, and never half."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe_server.events.hub import Event
from tensafe_server.operations.gaps import GapWatch
from tensafe_server.operations.gate import Gate
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import FAILED, QUEUED, PendingOperation, run_state
from tensafe_server.store.base import OperationRow, RunRow


class FakeStore:
    """Commits when told to."""

    def __init__(self) -> None:
        self.groups: list[list[OperationRow]] = []
        self.error: Exception | None = None

    def add_operations(
        self, rows: Sequence[OperationRow], then: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        self.groups.append(list(rows))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            assert then is not None
            then()
            future.set_result(None)
        return future


class FakeHub:
    def __init__(self) -> None:
        self.cursor = 0
        self.published: list[Event] = []

    def next_cursor(self) -> int:
        self.cursor += 1
        return self.cursor

    def publish(self, events: Sequence[Event]) -> None:
        self.published += events


class House:
    def __init__(self) -> None:
        self.store, self.hub, self.ledger = FakeStore(), FakeHub(), Ledger()
        self.ledger.runs["run-1"] = run_state(
            RunRow(
                "run-1", "ten-1", "m", training.RunConfig().SerializeToString(), 1, 0, 0, None, 0, 1
            )
        )
        self.gate = Gate(self.store, self.ledger, self.hub)  # type: ignore[arg-type]

    def operation(self, seq: int, *, refused: bool = False) -> PendingOperation:
        row = OperationRow(
            id=f"op-{seq}",
            tenant_id="ten-1",
            run_id="run-1",
            seq=seq,
            request_id=None,
            session_id="",
            kind=ops.OPERATION_KIND_OPTIM_STEP,
            state=FAILED if refused else QUEUED,
            executed=False,
            spec_hash=b"",
            spec=b"",
            spec_ref=None,
            artifact_id=None,
            cost=1,
            created_ns=1,
        )
        pending = PendingOperation(row, b"spec", "m", void=refused)
        self.ledger.reserve(pending, self.ledger.runs["run-1"])
        return pending


def test_a_lone_operation_passes_at_once():
    async def main() -> None:
        house = House()
        passing = asyncio.ensure_future(house.gate.stored([house.operation(1)]))
        await asyncio.sleep(0)
        assert len(house.store.groups) == 1
        await passing
        assert house.ledger.runs["run-1"].next_seq == 2

    asyncio.run(main())


def test_under_load_calls_share_a_commit():
    async def main() -> None:
        house = House()
        operations = [house.operation(seq) for seq in range(1, 41)]
        await asyncio.gather(*(house.gate.stored([operation]) for operation in operations))
        assert [len(group) for group in house.store.groups] == [40]
        assert house.ledger.runs["run-1"].next_seq == 41

    asyncio.run(main())


def test_a_refused_operation_is_numbered_as_it_is_stored():
    async def main() -> None:
        house = House()
        operations = [house.operation(seq, refused=seq == 2) for seq in range(1, 41)]
        waiting = [
            asyncio.ensure_future(house.gate.stored([operation])) for operation in operations
        ]
        await asyncio.sleep(0)
        other = house.hub.next_cursor()  # an outcome that is committed while the gate is open
        await asyncio.gather(*waiting)
        [event] = house.hub.published
        assert event.cursor > other

    asyncio.run(main())


def test_a_caller_that_goes_away_changes_nothing():
    async def main() -> None:
        house = House()
        operations = [house.operation(seq) for seq in range(1, 21)]
        waiting = [
            asyncio.ensure_future(house.gate.stored([operation])) for operation in operations
        ]
        await asyncio.sleep(0)
        waiting[3].cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[3], asyncio.CancelledError)
        assert house.ledger.runs["run-1"].next_seq == 21

    asyncio.run(main())


@pytest.mark.parametrize("error", [None, OSError("disk full")])
def test_who_asks_what_became_of_an_operation_waits_until_it_has_passed(error: OSError | None):
    """A caller that hung up and sends the same again is not told that it was never stored."""

    async def main() -> None:
        house = House()
        house.store.error = error
        await house.gate.passed()  # nothing stands there
        operations = [house.operation(seq) for seq in range(1, 21)]
        waiting = asyncio.ensure_future(house.gate.stored(operations[:1]))
        await asyncio.sleep(0)
        assert not house.store.groups
        await house.gate.passed()
        assert [len(group) for group in house.store.groups] == [1]
        if error is not None:
            with pytest.raises(OSError, match="disk full"):
                await waiting
        else:
            await waiting

    asyncio.run(main())


def test_what_could_not_be_stored_was_never_accepted():
    async def main() -> None:
        house = House()
        house.store.error = OSError("disk full")
        with pytest.raises(OSError, match="disk full"):
            await house.gate.stored([house.operation(1)])
        assert house.ledger.unfinished == 0
        assert house.ledger.usage("ten-1").operations == 0
        assert not house.ledger.runs["run-1"].by_seq

    asyncio.run(main())


def test_an_operation_at_the_gate_is_not_missing():
    """A gap that is closed meanwhile would store another in its place, and fail its whole group."""

    async def main() -> None:
        house = House()
        run = house.ledger.runs["run-1"]
        await house.gate.stored([house.operation(1)])
        await house.gate.stored([house.operation(3)])
        accepted = house.operation(2)
        outcomes: Any = None  # nothing ends
        watch = GapWatch(house.store, house.ledger, house.hub, outcomes, 60.0)  # type: ignore[arg-type]
        await watch.close(run)
        assert [row.seq for group in house.store.groups for row in group] == [1, 3]
        # Should it not be stored after all, the gap is closed later.
        assert run.gap_timer is not None
        run.gap_timer.cancel()
        await house.gate.stored([accepted])
        assert [operation.row.seq for operation in run.queue] == [1, 2, 3]

    asyncio.run(main())
