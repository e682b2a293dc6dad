"""Keys and values of rows that are being continued, in pools of rows of one capacity.

A row has a slot of its pool from its beginning to its end, as large as it may become, so that a row
that has begun never runs out of room. What was in a slot is wiped when its row leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from workers.engine.memory import is_memory_error

log = logging.getLogger(__name__)

Owner = TypeVar("Owner")

_LEAST_CAPACITY = 64
_FINER_FROM = 1024
_GROWTH = 4
"""A pool that is full grows by at least this part of itself, as far as there is room."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer's attention keeps of each token: `groups` keys and values."""

    groups: int
    key_size: int
    value_size: int


def capacity_for(tokens: int) -> int:
    """The capacity of a row of so many tokens: few different ones, so that rows share pools.

    64, 128, … 1024, 1536, 2048, 3072, …: at most twice what is needed, at most half more beyond
    1,024 tokens.
    """
    capacity = _LEAST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    if capacity > _FINER_FROM and tokens <= capacity * 3 // 4:
        return capacity * 3 // 4
    return capacity


@dataclass(eq=False, slots=True)
class Place(Generic[Owner]):
    """One row's slot.

    Attributes:
        length: tokens whose keys and values lie in it.
        used: most tokens that have lain in it.
    """

    pool: Pool[Owner]
    slot: int
    owner: Owner
    length: int = 0
    used: int = 0

    def hand_over(self, owner: Owner, length: int) -> None:
        """Gives it to another row that begins with the same tokens."""
        self.used = max(self.used, self.length)
        self.owner, self.length = owner, length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Puts a layer's keys and values [T, G, E] of its first tokens down."""
        self.pool.keys[layer][self.slot, :, :, : len(keys)] = keys.permute(1, 2, 0)
        self.pool.values[layer][self.slot, :, : len(values)] = values.transpose(0, 1)


class Pool(Generic[Owner]):
    """Slots of one capacity; the first `len(places)` are taken.

    Attributes:
        keys: for each layer [S, G, E, C]: the product with a query takes them as they lie.
        values: for each layer [S, G, C, E].
        places: the rows, by slot.
    """

    def __init__(
        self, capacity: int, shapes: Sequence[LayerShape], dtype: torch.dtype, device: str
    ) -> None:
        self.capacity = capacity
        self._shapes = shapes
        self._options = {"dtype": dtype, "device": device}
        self.slots = 0
        self.keys = [self._keys(0, shape) for shape in shapes]
        self.values = [self._values(0, shape) for shape in shapes]
        self.places: list[Place[Owner]] = []

    # Zeros: what lies behind a row's end is multiplied by probabilities of zero.

    def _keys(self, slots: int, shape: LayerShape) -> Tensor:
        size = slots, shape.groups, shape.key_size, self.capacity
        return torch.zeros(size, **self._options)  # type: ignore[call-overload, no-any-return]

    def _values(self, slots: int, shape: LayerShape) -> Tensor:
        size = slots, shape.groups, self.capacity, shape.value_size
        return torch.zeros(size, **self._options)  # type: ignore[call-overload, no-any-return]

    def by_token(self) -> list[Tensor]:
        """All of them as [S, C, G, E], for moving rows."""
        return [
            *(keys.permute(0, 3, 1, 2) for keys in self.keys),
            *(values.permute(0, 2, 1, 3) for values in self.values),
        ]

    def resize(self, slots: int) -> None:
        """Grows or shrinks, layer by layer, so that little is there twice."""
        taken = len(self.places)
        for layer, shape in enumerate(self._shapes):
            keys, values = self._keys(slots, shape), self._values(slots, shape)
            keys[:taken] = self.keys[layer][:taken]
            values[:taken] = self.values[layer][:taken]
            self.keys[layer], self.values[layer] = keys, values
        self.slots = slots

    def take(self, owner: Owner) -> Place[Owner]:
        """The next free slot; there is one."""
        place = Place(self, len(self.places), owner)
        self.places.append(place)
        return place

    def free(self, place: Place[Owner]) -> None:
        """Gives a slot back; the last row moves into it, so that rows stay neighbours."""
        last = self.places.pop()
        kept, left = last.length, max(place.used, place.length)
        for tensor in self.by_token():
            if last is not place:
                tensor[place.slot, :kept] = tensor[last.slot, :kept]
                tensor[place.slot, kept:left] = 0
            tensor[last.slot, : max(last.used, kept)] = 0
        if last is not place:
            last.slot = place.slot
            last.used = last.length
            self.places[place.slot] = last

    def copy(self, source: Place[Owner], target: Place[Owner], length: int) -> None:
        """Copies the first tokens of a row, of this or another pool, to one of this."""
        for theirs, ours in zip(source.pool.by_token(), self.by_token(), strict=True):
            ours[target.slot, :length] = theirs[source.slot, :length]
        target.length = length


class KeyValueCache(Generic[Owner]):
    """All pools of one model, within a budget.

    Args:
        shapes: of the model's layers.
        dtype: of keys and values.
        budget_bytes: most memory.

    Attributes:
        pools: by capacity.
        token_bytes: of one token in all layers.
        beside_bytes: what else is held for the rows and counts towards the budget.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: str, budget_bytes: int
    ) -> None:
        self._shapes = shapes
        self._dtype, self._device = dtype, device
        numbers = sum(shape.groups * (shape.key_size + shape.value_size) for shape in shapes)
        self.token_bytes = max(1, numbers * dtype.itemsize)
        self.budget_bytes = budget_bytes
        self.pools: dict[int, Pool[Owner]] = {}
        self.beside_bytes = 0
        self._alone_tokens = 0

    @property
    def tokens(self) -> int:
        """Most tokens that fit."""
        return self.budget_bytes // self.token_bytes

    def fits(self, tokens: int, beside_bytes: int = 0) -> bool:
        """Whether a row of so many tokens fits if it is alone, with so much beside it."""
        return capacity_for(tokens) + beside_bytes / self.token_bytes <= self.tokens

    def take(self, tokens: int, owner: Owner, *, alone: bool = False) -> Place[Owner] | None:
        """A slot for a row of at most so many tokens; None while there is no room.

        Args:
            alone: in a pool of its own.
        """
        capacity = capacity_for(tokens)
        try:
            if alone:
                return self._take_alone(capacity, owner)
            pool = self.pools.get(capacity) or self._new_pool(capacity)
            if len(pool.places) < pool.slots or self._grow(pool):
                self.pools[capacity] = pool
                return pool.take(owner)
            return None
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
        # There is less memory than was promised; what is held is what there is.
        self.budget_bytes = self._taken_tokens() * self.token_bytes
        log.warning("out of memory; samples now take %d tokens", self.tokens)
        return None

    def release(self, place: Place[Owner]) -> None:
        """Gives a row's slot back."""
        pool = place.pool
        pool.free(place)
        if self.pools.get(pool.capacity) is not pool:
            self._alone_tokens -= pool.capacity
        elif not pool.places:
            del self.pools[pool.capacity]

    def _take_alone(self, capacity: int, owner: Owner) -> Place[Owner] | None:
        if not self._make_room(capacity):
            return None
        pool = self._new_pool(capacity)
        pool.resize(1)
        self._alone_tokens += capacity
        return pool.take(owner)

    def _new_pool(self, capacity: int) -> Pool[Owner]:
        return Pool(capacity, self._shapes, self._dtype, self._device)

    def _grow(self, pool: Pool[Owner]) -> bool:
        if not self._make_room(pool.capacity):
            return False
        free = (self.tokens - self._taken_tokens()) // pool.capacity
        pool.resize(pool.slots + max(1, min(free, pool.slots // _GROWTH)))
        return True

    def _make_room(self, capacity: int) -> bool:
        if self._taken_tokens() + capacity <= self.tokens:
            return True
        for pool in [*self.pools.values()]:
            if pool.slots > len(pool.places):
                pool.resize(len(pool.places))
        return self._taken_tokens() + capacity <= self.tokens

    def _taken_tokens(self) -> int:
        beside = -(-self.beside_bytes // self.token_bytes)
        pools = sum(pool.slots * pool.capacity for pool in self.pools.values())
        return beside + self._alone_tokens + pools
