"""The accountant at work: off the event loop, and never the same twice."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar, cast

from tensafe_server.privacy import accounting
from tensafe_server.privacy.mechanisms import Composition, Mechanism, Terms

T = TypeVar("T", int, float)

_REMEMBERED = 65_536
_EXACT_UP_TO = 32
_SPACING = 64
"""Beyond `_EXACT_UP_TO`, ε(n) is computed where n is a multiple of about n / 64."""


class Accountant:
    """Answers in the order of the questions, from two threads.

    A PLD takes 0.1 s to some seconds, and who searches needs dozens of them. Searches have a thread
    of their own, so that a step that asks for its ε waits for single PLDs at most.
    """

    def __init__(self) -> None:
        self._answers, self._searches = (
            ThreadPoolExecutor(1, thread_name_prefix=f"privacy-accountant-{name}")
            for name in ("answers", "searches")
        )
        self._known: OrderedDict[Hashable, int | float] = OrderedDict()

    def close(self) -> None:
        """Drops what waits."""
        for thread in (self._answers, self._searches):
            thread.shutdown(wait=False, cancel_futures=True)

    async def epsilon(self, composition: Composition, terms: Terms) -> float:
        """ε of a composition.

        Raises:
            UnsupportedCompositionError: it cannot be added up.
        """
        key = (_frozen(composition), terms)
        return await self._once(self._answers, key, lambda: accounting.epsilon(composition, terms))

    async def running_epsilon(
        self, composition: Composition, mechanism: Mechanism, terms: Terms
    ) -> float:
        """ε of a composition that grows by one mechanism, step by step.

        Where that takes its time, it is interpolated between computed points, which lie n / 64
        apart. ε(n) curves so little that this differs from `epsilon` by less than 1e-5 of it.

        Raises:
            UnsupportedCompositionError: it cannot be added up.
        """
        if not accounting.is_slow(composition, terms):
            return await self.epsilon(composition, terms)
        n = composition.get(mechanism, 0)
        below, above = _knots(n)

        async def at(uses: int) -> float:
            return await self.epsilon({**composition, mechanism: uses}, terms)

        low = await at(below)
        if above == below:
            return low
        high = await at(above)
        return low + (high - low) * (n - below) / (above - below)

    async def most_uses(
        self, composition: Composition, mechanism: Mechanism, target_epsilon: float, terms: Terms
    ) -> int:
        """How often in all a mechanism may be used beside the others of a composition.

        Raises:
            UnsupportedCompositionError: it cannot be added up.
        """
        others = {other: n for other, n in composition.items() if other != mechanism}
        key = (_frozen(others), mechanism, target_epsilon, terms)
        is_slow = accounting.is_slow({**others, mechanism: 1}, terms)
        return await self._once(
            self._searches if is_slow else self._answers,
            key,
            lambda: accounting.most_uses(others, mechanism, target_epsilon, terms),
        )

    async def noise_multiplier(
        self,
        target_epsilon: float,
        steps: int,
        terms: Terms,
        sample_rate: float,
        before: Composition,
    ) -> float:
        """The least σ with which so many steps stay within ε after what was released before.

        Raises:
            ValueError: none is enough.
            UnsupportedCompositionError: it cannot be added up.
        """
        asked = (target_epsilon, steps, terms, sample_rate)
        return await self._once(
            self._searches,
            (*asked, _frozen(before)),
            lambda: accounting.noise_multiplier(*asked, before),
        )

    async def _once(self, thread: Executor, key: Hashable, compute: Callable[[], T]) -> T:
        if (known := self._known.get(key)) is not None:
            return cast("T", known)
        return await asyncio.get_running_loop().run_in_executor(
            thread, self._on_thread, key, compute
        )

    def _on_thread(self, key: Hashable, compute: Callable[[], T]) -> T:
        # Whoever asked the same before has been answered by now, as before a client's repetition:
        # equal questions go to one thread.
        if (known := self._known.get(key)) is not None:
            return cast("T", known)
        found = compute()
        self._known[key] = found
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found


def _frozen(composition: Composition) -> Hashable:
    return frozenset((mechanism, n) for mechanism, n in composition.items() if n)


def _knots(n: int) -> tuple[int, int]:
    """The computed points beside n."""
    if n <= _EXACT_UP_TO:
        return n, n
    spacing = max(1, 1 << (n // _SPACING).bit_length() - 1) if n >= _SPACING else 1
    below = n - n % spacing
    return below, below if below == n else below + spacing
