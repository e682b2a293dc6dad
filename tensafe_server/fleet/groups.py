"""The groups that a worker has, in the order in which it executes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensafe_server.planning.views import GroupView, Kind, Work


@dataclass(slots=True)
class _Group:
    kind: Kind | None
    model: str
    cost: float = 0.0
    begun: bool = False
    operations: set[str] = field(default_factory=set)


class GroupBook:
    """Which operation is in which group of one worker, until it has ended.

    Args:
        generates: the worker goes on with its other groups while it generates samples: a sample
            that has begun is in no group any more.
    """

    def __init__(self, *, generates: bool = False) -> None:
        self._beside = frozenset([Kind.UPDATE, Kind.SAMPLE] if generates else [Kind.UPDATE])
        self._generates = generates
        self._groups: dict[int, _Group] = {}
        self._numbers: dict[str, int] = {}
        self._last = 0

    @property
    def next(self) -> int:
        """The number of the next group."""
        return self._last + 1

    @property
    def plans(self) -> int:
        """How many groups are more than updates, and samples that are generated beside others."""
        return sum(group.kind not in self._beside for group in self._groups.values())

    def number_of(self, operation_id: str) -> int:
        """The group of an operation; 0 if it is in none."""
        return self._numbers.get(operation_id, 0)

    def put(self, operation_id: str, number: int, work: Work, model: str) -> None:
        """Notes an operation that was sent."""
        group = self._groups.setdefault(number, _Group(work.kind, model))
        group.cost += work.cost
        group.operations.add(operation_id)
        self._numbers[operation_id] = number
        self._last = max(self._last, number)

    def started(self, operation_id: str) -> None:
        """The worker has begun the operation's group: nothing joins it any more."""
        group = self._groups.get(self.number_of(operation_id))
        if group is None:
            return
        group.begun = True
        if self._generates and group.kind is Kind.SAMPLE:
            self.ended(operation_id)

    def ended(self, operation_id: str) -> None:
        """The worker has no more to do for the operation."""
        number = self._numbers.pop(operation_id, 0)
        group = self._groups.get(number)
        if group is not None:
            group.operations.discard(operation_id)
            if not group.operations:
                del self._groups[number]

    def first(self) -> set[str]:
        """The operations of the group that the worker is at, or is next to begin."""
        return set(self._groups[min(self._groups)].operations) if self._groups else set()

    def waiting(self) -> list[GroupView]:
        """The groups that the worker has not begun, as far as is known. The first one it begins as
        soon as it has it."""
        return [
            GroupView(number, group.kind, group.model, group.cost)
            for number, group in sorted(self._groups.items())[1:]
            if not group.begun
        ]
