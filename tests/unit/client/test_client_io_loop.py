"""Ctrl-C in the middle of handing a call over leaves no call behind."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

import pytest

from tensafe_client.io_loop import io_loop


@pytest.mark.parametrize("when", ["scheduled", "begun"])
def test_an_interrupted_call_is_taken_back(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Before the caller has its future, and before or after it has begun to run."""
    io = io_loop()
    begun, interrupt = threading.Event(), threading.Event()
    hand_over = asyncio.run_coroutine_threadsafe

    async def wait_for_ever() -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    def interrupted(coroutine: Any, loop: Any) -> Any:
        if when == "scheduled":
            loop.call_soon_threadsafe(interrupt.wait, 10)  # nothing begins before it
        hand_over(coroutine, loop)
        if when == "begun":
            assert begun.wait(10)
        raise KeyboardInterrupt

    call = wait_for_ever()
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.run(call)
    monkeypatch.undo()
    interrupt.set()
    for _ in range(3):  # turns of the loop
        io.run(asyncio.sleep(0))
    assert inspect.getcoroutinestate(call) == inspect.CORO_CLOSED
    assert begun.is_set() is (when == "begun")


def test_an_error_that_looks_like_a_time_limit_is_the_calls_own() -> None:
    async def call() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        io_loop().run(call())
