"""What a CPU's threads are used for, against the ways that were dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import torch

from benchmarks.engine import (
    Setting,
    Step,
    in_turn,
    one_rows,
    open_runs,
    quotient,
    take_turns,
    tenants_rows,
    together,
)
from workers.engine import dividing, strands

_AS_IT_IS = "as it is"
_MANY = ((8, 16), (8, 64), (8, 128))
_ALONE = (16, 64, 256)

Way = Callable[[], AbstractContextManager[object]]


def measure(setting: Setting) -> dict[str, list[float]]:
    """Seconds of a step by `threads/CELL/WAY`."""
    backend = setting.backend
    found: dict[str, list[float]] = {}
    with open_runs(setting, max(tenants for tenants, _ in _MANY)) as names:
        cells: dict[str, Step] = {
            name: lambda own=own: in_turn(backend, names[:1], [own])
            for name, own in one_rows(setting).items()
        }
        for tenants, length in (*((1, length) for length in _ALONE), *_MANY):
            own = tenants_rows(setting, tenants, length)
            cells[f"{tenants}x{length}"] = lambda own=own: together(backend, names[: len(own)], own)
        for cell, step in cells.items():
            ways = {f"threads/{cell}/{name}": _in(way, step) for name, way in _WAYS.items()}
            take_turns(ways, setting, found)
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """How much of each other way's time a step takes as it is."""
    result = {}
    for name, seconds in found.items():
        cell, _, way = name.rpartition("/")
        if way != _AS_IT_IS:
            result[f"{cell} time / {way}"] = quotient(found[f"{cell}/{_AS_IT_IS}"], seconds)
    return result


def _in(way: Way, step: Step) -> Step:
    def run() -> None:
        with way():
            step()

    return run


@contextmanager
def _without_strands() -> Iterator[None]:
    """One operation after the other, by as many threads as each is worth."""
    with patch.object(strands, "_LEAST_TOKENS", sys.maxsize):
        yield


@contextmanager
def _all_for_everything() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_without_strands())
        for name in ("_WORTHY_PRODUCT", "_WORTHY_ELEMENTS"):
            stack.enter_context(patch.object(dividing, name, 0))
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_WAYS: dict[str, Way] = {
    _AS_IT_IS: ExitStack,
    "without strands": _without_strands,
    "all threads for everything": _all_for_everything,
    "one thread": _one_thread,
}
