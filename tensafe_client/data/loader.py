"""Shuffled batches over epochs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from tensafe_client.checks import check_bool, check_count
from tensafe_client.errors import ConfigError

T = TypeVar("T")


class DataLoader(Generic[T]):
    """Iterates batches of items, in an order that depends only on `seed` and the epoch.

        for batch in DataLoader(datums, batch_size=8, epochs=3, seed=0):
            tc.forward_backward(batch)

    Args:
        items: what to batch, usually datums.
        batch_size: items of one batch. The last batch of an epoch may be smaller.
        epochs: passes over the items. None: for ever.
        seed: fixes the order. None: no shuffling.
        drop_last: leave out a smaller last batch.
        start: batches to pass over, so that a resumed run goes on where it stopped.

    Raises:
        ConfigError: for a value of a wrong type or range, or if there is nothing to iterate.
    """

    def __init__(
        self,
        items: Sequence[T],
        *,
        batch_size: int = 8,
        epochs: int | None = 1,
        seed: int | None = 0,
        drop_last: bool = False,
        start: int = 0,
    ) -> None:
        if not isinstance(items, Sequence):
            raise ConfigError.of(
                "items", f"must be a list or another sequence, got {type(items).__name__}"
            )
        batch_size = check_count("batch_size", batch_size)
        epochs = None if epochs is None else check_count("epochs", epochs)
        start = check_count("start", start, bits=63)
        seed = None if seed is None else check_count("seed", seed, bits=64)
        check_bool("drop_last", drop_last)
        for name, count in (("batch_size", batch_size), ("epochs", epochs)):
            if count == 0:
                raise ConfigError.of(name, "must be 1 or more")
        self._items = items
        self._batch_size = batch_size
        self._epochs = epochs
        self._seed = seed
        self._start = start
        whole, rest = divmod(len(items), batch_size)
        self.batches_per_epoch = whole + (1 if rest and not drop_last else 0)
        if self.batches_per_epoch == 0:
            raise ConfigError.of("items", f"make no batch of {batch_size}: there are {len(items)}")

    def __len__(self) -> int:
        """Batches in all; raises TypeError for an endless loader."""
        if self._epochs is None:
            raise TypeError("an endless DataLoader has no length")
        return max(0, self.batches_per_epoch * self._epochs - self._start)

    def __iter__(self) -> Iterator[list[T]]:
        epoch, first = divmod(self._start, self.batches_per_epoch)
        while self._epochs is None or epoch < self._epochs:
            order = self._order(epoch)
            for batch in range(first, self.batches_per_epoch):
                begin = batch * self._batch_size
                yield [self._items[i] for i in order[begin : begin + self._batch_size]]
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(len(self._items)))
        order: list[int] = (
            np.random.default_rng([self._seed, epoch]).permutation(len(self._items)).tolist()
        )
        return order
