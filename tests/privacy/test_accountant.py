"""The accountant's thread, its memory, and what it interpolates."""

import asyncio
import threading

import pytest

from tensafe_server.privacy import accounting
from tensafe_server.privacy.accountant import Accountant, _knots
from tensafe_server.privacy.mechanisms import Mechanism, Terms

MECHANISM = Mechanism(1.1, 0.02)


def test_interpolated_values_are_those_of_the_accountant() -> None:
    async def worst(counts: list[int]) -> float:
        accountant, terms = Accountant(), Terms(1e-5)
        found = []
        for n in counts:
            used = {MECHANISM: n}
            exact = accounting.epsilon(used, terms)
            running = await accountant.running_epsilon(used, MECHANISM, terms)
            found.append(abs(running - exact) / exact)
        accountant.close()
        return max(found)

    assert asyncio.run(worst([1, 33, 65, 131, 407, 999, 2600])) < 1e-5


def test_knots_are_close_and_enclose() -> None:
    for n in range(5000):
        below, above = _knots(n)
        assert below <= n <= above
        assert above - below <= max(1, n / 64)
        assert n > 32 or below == above == n


def test_nothing_is_computed_twice_or_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = accounting.epsilon

    def counted(*args: object) -> float:
        calls.append(threading.current_thread().name)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(accounting, "epsilon", counted)

    async def ask() -> None:
        accountant, terms = Accountant(), Terms(1e-5)
        first = await accountant.epsilon({Mechanism(1.0): 3}, terms)
        again = await accountant.epsilon({Mechanism(1.0): 3, Mechanism(2.0): 0}, terms)
        assert first == again
        accountant.close()

    asyncio.run(ask())
    assert len(calls) == 1
    assert calls[0].startswith("privacy-accountant")


def test_a_step_does_not_wait_for_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tenant's new run may have to look for its noise in hard parameters."""
    begun, go = threading.Event(), threading.Event()

    def endless(*args: object) -> float:
        begun.set()
        assert go.wait(60)
        return 1.0

    monkeypatch.setattr(accounting, "noise_multiplier", endless)
    monkeypatch.setattr(accounting, "most_uses", lambda *args: 7)

    async def ask() -> None:
        accountant, terms = Accountant(), Terms(1e-5)
        search = asyncio.create_task(accountant.noise_multiplier(8.0, 40, terms, 0.02, {}))
        await asyncio.to_thread(begun.wait, 60)
        assert await accountant.epsilon({MECHANISM: 3}, terms) > 0
        assert await accountant.most_uses({}, Mechanism(2.0), 3.0, terms) == 7
        assert not search.done()
        go.set()
        assert await search == 1.0
        accountant.close()

    asyncio.run(ask())


def test_who_asks_the_same_again_meanwhile_waits_for_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that lost patience repeats its call."""
    computed: list[int] = []
    monkeypatch.setattr(
        accounting, "noise_multiplier", lambda *args: computed.append(1) or float(len(computed))
    )

    async def ask() -> list[float]:
        accountant = Accountant()
        asked = (8.0, 40, Terms(1e-5), 0.02, {})
        found = await asyncio.gather(*(accountant.noise_multiplier(*asked) for _ in range(3)))
        accountant.close()
        return found

    assert asyncio.run(ask()) == [1.0, 1.0, 1.0]
    assert len(computed) == 1
