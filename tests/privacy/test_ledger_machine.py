"""Reserving, ending, reopening in any order: the ledger is whole, and no budget is passed."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe_client import DPConfig
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.accounting import epsilon
from tensafe_server.privacy.budgets import Budgets, Charge
from tensafe_server.privacy.lines import enforced
from tensafe_server.privacy.runs import PrivateRun
from tensafe_server.store.base import OperationRow, TenantRow
from tensafe_server.store.charges import LedgerEvent, first_break
from tensafe_server.store.sqlite import SqliteStore

TARGET = 2.0


def a_run(number: int) -> PrivateRun:
    """Runs that differ in noise and in how often a unit may be used; no accountant is slow here."""
    dp = DPConfig(
        dataset_id="corpus",
        noise_multiplier=4.0 + 2 * (number % 2),
        target_epsilon=TARGET + 0.25 * number,
        target_delta=1e-5,
        max_participation=3 if number == 2 else None,
    ).to_proto()
    dp.accountant_type, dp.adjacency, dp.sampling = 1, 1, 2  # pld, add or remove, the client's
    config = training.RunConfig(model_ref="m", dp=dp, gradient_accumulation_steps=1)
    return PrivateRun.of(f"run-{number}", config)


class LedgerMachine(RuleBasedStateMachine):
    """Against a real store, which may be closed and opened at any moment, as a crash does."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        self.loop = asyncio.new_event_loop()
        self.runs = [a_run(number) for number in range(3)]
        self.accountant = Accountant()
        self.made = 0
        self.model: Counter[int] = Counter()
        self.open: dict[str, tuple[int, Charge]] = {}
        self.last: tuple[int, str] = (0, "")
        self.start(first=True)

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def start(self, *, first: bool = False) -> None:
        async def opened() -> SqliteStore:
            store = await SqliteStore.open(self.home / "store.db")
            if first:
                await store.add_tenant(TenantRow("ten-1", "a", 1))
            return store

        self.store = self.run(opened())
        self.budgets = Budgets(self.store, self.accountant)

    @rule(number=st.integers(0, 2))
    def reserve(self, number: int) -> None:
        self.made += 1
        operation = f"op-{self.made}"
        row = OperationRow(
            id=operation,
            tenant_id="ten-1",
            run_id=f"run-{number}",
            seq=self.made,
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

        async def reserved() -> Charge | None:
            await self.store.add_operations([row])
            asking = asyncio.ensure_future(
                self.budgets.reserve("ten-1", self.runs[number], f"run-{number}", operation, 1, [])
            )
            # While another charge may be released, a step that is too much waits.
            done, _ = await asyncio.wait({asking}, timeout=None if not self.open else 0.2)
            if not done:
                asking.cancel()
                return None
            error = asking.exception()
            if error is None:
                return asking.result()
            assert isinstance(error, TenSafeFault)
            assert error.detail.reason == "DP_BUDGET_EXCEEDED"
            assert not self.open
            return None

        allowed = self.would_cost(number) <= self.runs[number].target_epsilon
        charge = self.run(reserved())
        assert (charge is not None) == allowed
        if charge is not None:
            self.model[number] += 1
            self.open[charge.id] = (number, charge)

    @rule(data=st.data(), event=st.sampled_from(list(LedgerEvent)[1:]))
    def end(self, data: st.DataObject, event: LedgerEvent) -> None:
        if not self.open:
            return
        charge_id = data.draw(st.sampled_from(sorted(self.open)))
        number, charge = self.open.pop(charge_id)
        self.run(self.budgets.end_alone(charge, event))
        self.model[number] -= event is LedgerEvent.RELEASE

    @rule()
    def crash_and_reopen(self) -> None:
        """What was reserved and not ended counts; who comes back may still end it."""
        self.run(self.store.close())
        self.start()
        found = self.run(self.budgets.load())
        assert {charge.id for charge in found.values()} == set(self.open)
        for charge in found.values():
            self.open[charge.id] = (self.open[charge.id][0], charge)

    @invariant()
    def the_ledger_is_whole_and_only_grows(self) -> None:
        rows = self.run(self.store.ledger("ten-1", "corpus"))
        assert first_break(rows) is None
        entries, newest = self.last
        assert len(rows) >= entries
        if entries:
            assert rows[entries - 1].sha256 == newest
        self.last = (len(rows), rows[-1].sha256 if rows else "")

    @invariant()
    def what_counts_is_what_was_reserved_and_not_released(self) -> None:
        budget = self.run(self.budgets.dataset("ten-1", "corpus"))
        for number, private in enumerate(self.runs):
            assert budget.lines.get(private.line, 0) == self.model[number]

    def would_cost(self, number: int) -> float:
        uses = {private.line: self.model[n] for n, private in enumerate(self.runs)}
        uses[self.runs[number].line] += 1
        return epsilon(enforced(uses), self.runs[number].terms)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.accountant.close()
        self.loop.close()
        shutil.rmtree(self.home)


LedgerMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
TestLedger = LedgerMachine.TestCase
