"""The privacy ledger's rows, and the chain that ties them together.

An entry's SHA-256 is over its own fields and the SHA-256 of the entry before, so that whoever has
noted the newest one sees whether anything before it was changed, added or taken out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

GENESIS = "0" * 64
"""What stands before the first entry."""


class LedgerEvent(StrEnum):
    """What happened to a charge. All but a released one count as spent."""

    RESERVE = "reserve"
    COMMIT = "commit"
    RELEASE = "release"
    LOSE = "lose"


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """An entry of one dataset's ledger.

    Attributes:
        position: from 1, without gaps.
        line: JSON: which releases the charge is counted with.
        uses: of the line, without released ones, after this entry.
        epoch: the assignment to a worker under which the charge may be used.
    """

    tenant_id: str
    dataset_id: str
    position: int
    event: str
    charge_id: str
    run_id: str
    operation_id: str
    epoch: int
    line: str
    uses: int
    created_ns: int
    sha256: str

    def digest(self, before: str) -> str:
        """What `sha256` must be after an entry with that one."""
        content = asdict(self) | {"sha256": before}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def sealed(self, before: str) -> LedgerRow:
        return replace(self, sha256=self.digest(before))


@dataclass(frozen=True, slots=True)
class Reservation:
    """A charge that is to be written down before anything is released under it.

    Attributes:
        at_most: the line may have so many uses, this one included; None: any number.
        units: of a run whose units may be used a bounded number of times, those in the step.
        max_uses: that number.
    """

    tenant_id: str
    dataset_id: str
    charge_id: str
    run_id: str
    operation_id: str
    epoch: int
    line: str
    created_ns: int
    at_most: int | None = None
    units: Sequence[bytes] = ()
    max_uses: int = 0


@dataclass(frozen=True, slots=True)
class ChargeEnd:
    """What became of a charge.

    Attributes:
        units: of a released one, those whose use it takes back.
    """

    reserved: LedgerRow
    event: LedgerEvent
    created_ns: int
    units: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """A whole ledger.

    Attributes:
        end: position and SHA-256 of its newest entry, noted apart from it; None: it has none.
    """

    rows: list[LedgerRow]
    end: tuple[int, str] | None

    def first_break(self) -> int | None:
        """As the function; entries that are missing at the end, or one too many, count too."""
        broken = first_break(self.rows)
        if broken is not None:
            return broken
        found = (self.rows[-1].position, self.rows[-1].sha256) if self.rows else None
        if found == self.end:
            return None
        return min(len(self.rows), self.end[0] if self.end is not None else 0) + 1


def first_break(rows: Iterable[LedgerRow]) -> int | None:
    """The position from which on a ledger, read from its beginning, is not what was written; None
    if it is whole."""
    before = GENESIS
    for position, row in enumerate(rows, 1):
        if row.position != position or row.digest(before) != row.sha256:
            return position
        before = row.sha256
    return None
