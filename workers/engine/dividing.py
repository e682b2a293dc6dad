"""How many CPU threads each operation of a pass is divided among: all, or one.

A worker's idle threads sleep, so that they take nothing from their neighbours. To wake them takes
longer than most operations of a short pass, and a pass has thousands. So they are woken for what is
worth it; shapes alone decide, so that it is the same each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_WORTHY_PRODUCT = 50_000_000
"""Multiply-adds, some 0.5 ms of one core in bfloat16. Half or a quarter of it takes SmolLM2's steps
as long, and more CPU time."""
_ROWS_TO_READ = 24
"""A product of few rows takes as long as it takes to read the matrix: of 1 row with [2048, 2048]
1.0 ms, and 0.036 more for each row more."""
_WORTHY_ELEMENTS = 2**19
"""Numbers that element-wise operations go over at once. Passes of 64 to 512 tokens of SmolLM2, of
2**15 to 2**18 numbers, take 0.6 to 0.9 of the time if one thread does all but products; of 2**20
and wider layers 0.97, of 2**21 1.07 to 1.15."""


class _Pass(threading.local):
    """Of each thread of Python's, as torch's number of threads is.

    Attributes:
        threads: that the pass at hand may use; 0 outside passes.
    """

    threads: int = 0


_pass = _Pass()


@contextmanager
def dividing(elements: int, device: str = "cpu") -> Iterator[None]:
    """Operations inside are divided if they go over many numbers, and `product`s by their own size;
    on another device than a CPU nothing changes. Inside another one, its own elements count.

    Args:
        elements: that an operation goes over.
    """
    before, outer = torch.get_num_threads(), _pass.threads
    if device != "cpu" or (outer or before) == 1:
        yield
        return
    _pass.threads = outer or before
    try:
        _use(_pass.threads if elements >= _WORTHY_ELEMENTS else 1)
        yield
    finally:
        _pass.threads = outer
        _use(before)


def chooses() -> bool:
    """Whether a pass is at hand in which products are divided or not."""
    return _pass.threads > 0


def product(
    rows: int, matrix: int, compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """What `compute` returns, which is one product, or several of this size each.

    Args:
        rows: that the matrix is multiplied with.
        matrix: its numbers.
    """
    if not _pass.threads:
        return compute(*args, **kwargs)
    before = torch.get_num_threads()
    _use(_pass.threads if (rows + _ROWS_TO_READ) * matrix >= _WORTHY_PRODUCT else 1)
    try:
        return compute(*args, **kwargs)
    finally:
        _use(before)


def _use(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
