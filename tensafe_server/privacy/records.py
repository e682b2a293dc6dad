"""Ledgers as they are on disk: read, and checked before anything is built on them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tensafe.wire.status import TenSafeFault
from tensafe_server.privacy.lines import Line, uses_of_lines
from tensafe_server.store.base import Store
from tensafe_server.store.charges import LedgerRow


@dataclass(frozen=True, slots=True)
class ReadLedger:
    """A dataset's ledger at one moment.

    Attributes:
        lines: uses of each line; of one that is broken, before it is.
        broken: the position from which on it is not what was written; None: it is whole.
    """

    dataset_id: str
    rows: list[LedgerRow]
    lines: dict[Line, int]
    broken: int | None


async def read_ledger(store: Store, tenant_id: str, dataset_id: str) -> ReadLedger:
    """Reads a whole ledger, which may have 100,000 entries, beside the event loop."""
    record = await store.ledger_record(tenant_id, dataset_id)
    broken = await asyncio.to_thread(record.first_break)
    whole = record.rows if broken is None else record.rows[: broken - 1]
    lines = await asyncio.to_thread(uses_of_lines, whole)
    return ReadLedger(dataset_id, record.rows, lines, broken)


def check_whole(dataset_id: str, broken: int | None) -> None:
    """Of a ledger that is not what was written nothing is told, and nothing is charged to it.

    Raises:
        TenSafeFault: CHECKSUM_MISMATCH.
    """
    if broken is None:
        return
    raise TenSafeFault(
        "CHECKSUM_MISMATCH",
        f"the ledger of dataset {dataset_id} is not what was written, from entry {broken} on; "
        "restore the server's store from a backup, and tell the operator",
        dataset_id=dataset_id,
        position=broken,
    )
