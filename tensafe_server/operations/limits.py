"""How much may wait: limits by operations and by bytes, of one tenant and of all together."""

from __future__ import annotations

from dataclasses import dataclass

from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.ledger import Ledger, Usage
from tensafe_server.operations.model import RunState

RETRY_S = 0.1
_ALL = ""
"""Whoever owns a limit that all tenants share."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait at a time, in operations and in bytes of their specs.

    Attributes:
        tenant_operations, tenant_bytes: of one tenant.
        all_operations, all_bytes: of all tenants together.
        tenant_streams: token streams that one tenant may have open.
        early_seqs: how far an operation may be ahead of the first missing seq.
    """

    tenant_operations: int = 20_000
    tenant_bytes: int = 4 * 2**30
    all_operations: int = 100_000
    all_bytes: int = 32 * 2**30
    early_seqs: int = 4096
    tenant_streams: int = 1000


class Admission:
    """Says whether one more operation may wait.

    Operations that came ahead of a missing seq may fill half of each limit at most: the other half
    is left by those that can run, so that the missing one always finds room.
    """

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits

    def check(self, tenant_id: str, size_bytes: int, *, ahead: bool) -> None:
        """Raises TenSafeFault QUEUE_FULL, naming the limit and whose it is."""
        limits, share = self._limits, 2 if ahead else 1
        for owner, usage, operations, size in (
            (
                tenant_id,
                self._ledger.usage(tenant_id),
                limits.tenant_operations,
                limits.tenant_bytes,
            ),
            (_ALL, self._ledger.total, limits.all_operations, limits.all_bytes),
        ):
            if usage.operations + 1 > operations // share:
                raise _full(owner, "operations", operations, usage, ahead)
            # A lone operation larger than the limit would wait for ever.
            if usage.operations and usage.bytes + size_bytes > size // share:
                raise _full(owner, "bytes", size, usage, ahead)

    def check_distance(self, run: RunState, seq: int) -> None:
        """Raises TenSafeFault QUEUE_FULL for a seq too far ahead of what is missing."""
        if seq >= run.next_seq + self._limits.early_seqs:
            raise TenSafeFault(
                "QUEUE_FULL",
                f"seq {seq} of {run.id} is {self._limits.early_seqs} or more ahead of "
                f"{run.next_seq}, which is still missing; send that first",
                retry_delay_s=RETRY_S,
                limit="early_seqs",
                limit_value=self._limits.early_seqs,
                resource=f"runs/{run.id}",
            )


def _full(owner: str, unit: str, value: int, usage: Usage, ahead: bool) -> TenSafeFault:
    half = ", of which those ahead of a missing seq may fill half" if ahead else ""
    whose = "server" if owner == _ALL else f"tenants/{owner}"
    limit = f"{'all' if owner == _ALL else 'tenant'}_{unit}"
    return TenSafeFault(
        "QUEUE_FULL",
        f"the queue of {whose} holds {usage.operations} operations with {usage.bytes} bytes; the "
        f"limit {limit} is {value}{half}. Send it again when some have ended",
        retry_delay_s=RETRY_S,
        limit=limit,
        limit_value=value,
        resource=whose,
    )
