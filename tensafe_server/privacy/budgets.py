"""Who may still release something of a dataset, and what it costs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from tensafe.wire.status import TenSafeFault
from tensafe_server.ids import new_id
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.accounting import MOST_STEPS, UnsupportedCompositionError
from tensafe_server.privacy.lines import Line, Lines, Unit, all_drawn, enforced, if_poisson
from tensafe_server.privacy.mechanisms import Composition, Mechanism
from tensafe_server.privacy.records import ReadLedger, check_whole, read_ledger
from tensafe_server.privacy.runs import PrivateRun
from tensafe_server.store.base import Store
from tensafe_server.store.charges import ChargeEnd, LedgerEvent, LedgerRow, Reservation

_MANY: dict[Unit, str] = {"example": "examples", "unit_id": "unit ids"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs, at its place in the ledger.

    Attributes:
        before: ε of the ledger without the step.
        total: ε with it.
        if_poisson: ε with it, had all batches been drawn as was attested; None where that is not
            attested, or not in question.
        steps_left: steps that its run may still make; None: there is no end.
        sampling_verified: whether the server drew all that `total` adds up.
    """

    before: float
    total: float
    if_poisson: float | None = None
    steps_left: int | None = None
    sampling_verified: bool = False


@dataclass(slots=True, eq=False)
class Charge:
    """A charge that is in the ledger, and whose end is not.

    Attributes:
        handed_over: a worker may have been given it.
        units: those whose uses it counts.
    """

    reserved: LedgerRow
    cost: Cost | None = None
    units: list[bytes] = field(default_factory=list)
    handed_over: bool = False

    @property
    def id(self) -> str:
        return self.reserved.charge_id

    @property
    def epoch(self) -> int:
        return self.reserved.epoch


class DatasetBudget:
    """One dataset's ledger in memory: uses by line, and open charges.

    Attributes:
        deciding: held while it is decided whether a step may be made.
        waiting: resolves with the next end of a charge.
    """

    def __init__(self, ledger: ReadLedger) -> None:
        self._dataset_id, self._broken = ledger.dataset_id, ledger.broken
        self.lines = ledger.lines
        self.open: dict[str, Charge] = {}
        self.deciding = asyncio.Lock()
        self.waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def check(self) -> None:
        """Raises TenSafeFault CHECKSUM_MISMATCH if the ledger was not what had been written."""
        check_whole(self._dataset_id, self._broken)

    def opened(self, charge: Charge) -> None:
        self.open[charge.id] = charge
        self.lines[Line.from_json(charge.reserved.line)] = charge.reserved.uses

    def ended(self, charge: Charge, event: LedgerEvent) -> None:
        self.open.pop(charge.id, None)
        if event is LedgerEvent.RELEASE:
            line = Line.from_json(charge.reserved.line)
            self.lines[line] = max(0, self.lines.get(line, 0) - 1)
        self.waiting.set_result(None)
        self.waiting = asyncio.get_running_loop().create_future()


class Budgets:
    """All ledgers."""

    def __init__(self, store: Store, accountant: Accountant) -> None:
        self._store = store
        self._accountant = accountant
        self._datasets: dict[tuple[str, str], DatasetBudget] = {}
        self._loading = asyncio.Lock()

    async def load(self) -> dict[str, Charge]:
        """Takes up charges of unfinished operations that a crash has left open; by operation."""
        found = {}
        for row in await self._store.open_charges():
            charge = found[row.operation_id] = Charge(row, handed_over=True)
            (await self.dataset(row.tenant_id, row.dataset_id)).open[charge.id] = charge
        return found

    async def dataset(self, tenant_id: str, dataset_id: str) -> DatasetBudget:
        """A dataset's ledger; an empty one if nothing was released of it."""
        key = tenant_id, dataset_id
        if key not in self._datasets:
            async with self._loading:
                if key not in self._datasets:
                    self._datasets[key] = DatasetBudget(await read_ledger(self._store, *key))
        return self._datasets[key]

    async def spent(self, tenant_id: str, dataset_id: str) -> Composition:
        """What was released of a dataset, with no more assumed than was enforced.

        Raises:
            TenSafeFault: CHECKSUM_MISMATCH.
        """
        budget = await self.dataset(tenant_id, dataset_id)
        budget.check()
        return enforced(budget.lines)

    async def check_unit(self, tenant_id: str, dataset_id: str, unit: Unit) -> None:
        """Refuses a privacy unit that is not that of the ledger's releases.

        Raises:
            TenSafeFault: UNSUPPORTED_OPTION.
        """
        _check_unit(dataset_id, (await self.dataset(tenant_id, dataset_id)).lines, unit)

    async def reserve(
        self,
        tenant_id: str,
        private: PrivateRun,
        run_id: str,
        operation_id: str,
        epoch: int,
        units: list[bytes],
    ) -> Charge:
        """Writes a step's charge down, so that it counts whatever happens from here on.

        A step that would pass the target waits while a charge is open that may be released.

        Raises:
            TenSafeFault: DP_BUDGET_EXCEEDED; UNSUPPORTED_OPTION if the ledger cannot be added up,
                or protects other units; CHECKSUM_MISMATCH if it is not what was written;
                STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        budget = await self.dataset(tenant_id, private.dataset_id)
        budget.check()
        reservation = Reservation(
            tenant_id=tenant_id,
            dataset_id=private.dataset_id,
            charge_id=new_id("chg"),
            run_id=run_id,
            operation_id=operation_id,
            epoch=epoch,
            line=private.line.to_json(),
            created_ns=time.time_ns(),
            units=units,
            max_uses=private.line.max_participation or 0,
        )
        while True:
            async with budget.deciding:
                _check_unit(private.dataset_id, budget.lines, private.line.unit)
                uses = budget.lines.get(private.line, 0) + 1
                at_most = await self._at_most(private, budget.lines)
                if at_most is None or uses <= at_most:
                    left = None if at_most is None else at_most - uses
                    cost = await self._cost(private, {**budget.lines, private.line: uses}, left)
                    row = await self._store.reserve_charge(replace(reservation, at_most=at_most))
                    if row is None:
                        raise RuntimeError(f"the ledger of {private.dataset_id} has other writers")
                    charge = Charge(row, cost, units)
                    budget.opened(charge)
                    return charge
                if not budget.open:
                    raise await self._exceeded(private, budget.lines, run_id)
                change = budget.waiting
            await asyncio.shield(change)  # others wait for the same

    async def cost(self, tenant_id: str, private: PrivateRun) -> Cost:
        """What the newest step of a run has cost, as the ledger is now."""
        budget = await self.dataset(tenant_id, private.dataset_id)
        return await self._newest_cost(private, budget.lines)

    async def exact_cost(self, private: PrivateRun, lines: Lines) -> Cost:
        """As `cost`, in a ledger of these lines, with nothing interpolated."""
        cost = await self._newest_cost(private, lines)
        poisson = await self._if_poisson(private, lines, exact=True)
        total = await self._accountant.epsilon(enforced(lines), private.terms)
        return replace(cost, total=total, if_poisson=poisson)

    async def _newest_cost(self, private: PrivateRun, lines: Lines) -> Cost:
        at_most = await self._at_most(private, lines)
        left = None if at_most is None else max(0, at_most - lines.get(private.line, 0))
        return await self._cost(private, lines, left)

    def end(self, charge: Charge, event: LedgerEvent) -> ChargeEnd:
        """What is to be written down of a charge's end. It holds in memory from now on, and the
        store insists on writing it."""
        reserved = charge.reserved
        self._datasets[reserved.tenant_id, reserved.dataset_id].ended(charge, event)
        units = charge.units if event is LedgerEvent.RELEASE else []
        return ChargeEnd(reserved, event, time.time_ns(), units)

    async def end_alone(self, charge: Charge, event: LedgerEvent) -> None:
        """Ends a charge whose operation does not end with it."""
        await self._store.end_charges([self.end(charge, event)])

    async def _at_most(self, private: PrivateRun, lines: Lines) -> int | None:
        """How many uses the run's line may have; None: any number."""
        if private.target_epsilon is None:
            return None
        line, mechanism = private.line, private.line.mechanism
        others = dict(enforced({other: n for other, n in lines.items() if other != line}))
        alike = others.pop(mechanism, 0)
        try:
            most = await self._accountant.most_uses(
                others, mechanism, private.target_epsilon, private.terms
            )
        except UnsupportedCompositionError as error:
            raise _unsupported(private, error) from error
        if most >= MOST_STEPS:
            return None
        most = max(0, most - alike)
        cap = line.max_participation
        return None if cap is not None and cap <= most else most

    async def _cost(self, private: PrivateRun, lines: Lines, steps_left: int | None) -> Cost:
        without = dict(lines)
        without[private.line] = max(0, without.get(private.line, 0) - 1)
        try:
            return Cost(
                await self._epsilon(private, without),
                await self._epsilon(private, lines),
                await self._if_poisson(private, lines, exact=False),
                steps_left,
                private.server_poisson and all_drawn(lines),
            )
        except UnsupportedCompositionError as error:
            raise _unsupported(private, error) from error

    async def _if_poisson(self, private: PrivateRun, lines: Lines, *, exact: bool) -> float | None:
        """What is told beside what counts; None also where it cannot be added up."""
        attested = None if private.server_poisson else if_poisson(lines)
        rate = private.line.sample_rate
        if attested is None or rate is None:
            return None
        try:
            if exact:
                return await self._accountant.epsilon(attested, private.terms)
            mechanism = Mechanism(private.line.noise_multiplier, rate)
            return await self._accountant.running_epsilon(attested, mechanism, private.terms)
        except UnsupportedCompositionError:
            return None

    async def _epsilon(self, private: PrivateRun, lines: Lines) -> float:
        return await self._accountant.running_epsilon(
            enforced(lines), private.line.mechanism, private.terms
        )

    async def _exceeded(self, private: PrivateRun, lines: Lines, run_id: str) -> TenSafeFault:
        spent = await self._epsilon(private, lines)
        return TenSafeFault(
            "DP_BUDGET_EXCEEDED",
            f"the step would take the ledger of dataset {private.dataset_id} beyond the run's "
            f"target ε {private.target_epsilon:g}; it has {spent:.4f} at δ "
            f"{private.terms.delta:g}. Nothing was done; `tensafe privacy report {run_id}` shows "
            "what was spent",
            run_id=run_id,
            dataset_id=private.dataset_id,
            current_epsilon=spent,
            max_epsilon=private.target_epsilon,
        )


def _check_unit(dataset_id: str, lines: Lines, unit: Unit) -> None:
    # An example's bound is none for a person with many of them; and a person's sum, clipped, may
    # move by 2C with one example of theirs.
    other = next((line.unit for line, uses in lines.items() if uses and line.unit != unit), None)
    if other is not None:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"config.dp.privacy_unit: what was released of dataset {dataset_id} protects "
            f"{_MANY[other]} and says nothing about {_MANY[unit]}; use {other}, so that it adds up",
            field="config.dp.privacy_unit",
            dataset_id=dataset_id,
        )


def _unsupported(private: PrivateRun, error: UnsupportedCompositionError) -> TenSafeFault:
    return TenSafeFault(
        "UNSUPPORTED_OPTION",
        f"the ledger of dataset {private.dataset_id} has releases under other parameters, and "
        f"{error}; go on in a run with another adjacency",
        field="config.dp.adjacency",
        dataset_id=private.dataset_id,
    )
