"""Computes a pass in strands: its parts at the same time, each by threads of its own.

Of what a pass does on a CPU only products are large enough to be divided among threads well. All
else one thread does about as fast, so that two do two halves of a pass at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from workers.engine.base_model import BaseModel
from workers.engine.computing import compute
from workers.engine.kernels import fused, in_use
from workers.engine.memory import thread_is_spoiled
from workers.engine.parting import parted
from workers.engine.passes import Call, Pass
from workers.engine.scoring import PortionLoss

T = TypeVar("T")

_LEAST_TOKENS = 192
"""Of a strand: with fewer, two at once take as long as all threads for one operation after the
other, and more CPU time (docs/benchmarks.md)."""
_START_S = 60.0
"""Until all threads of a crew have begun."""


def compute_in_strands(
    model: BaseModel,
    calls: Sequence[Call],
    work: Pass,
    *,
    trains: bool,
    drops: bool,
    frugal: bool,
    exact: bool,
) -> list[tuple[Pass, list[PortionLoss]]]:
    """Runs a pass, as `compute` does. How it is parted depends on the pass and on the number of
    threads alone.

    Returns:
        Its parts, and what came of each.

    Raises:
        LossFunctionError: a loss function failed.
    """
    own = [calls[share.call] for share in work.shares]
    # What keeps rows' gradients apart has kernels that do not depend on how much lies beside it.
    apart = any(call.private is not None for call in own)
    with fused(sys.maxsize if apart else len(work.ids), exact=exact):
        parts = [work]
        if _may_be_parted(model, own):
            parts = parted([call.batch for call in calls], work, _worthy(len(work.ids)))
        run = partial(compute, model, calls, trains=trains, drops=drops, frugal=frugal, exact=exact)
        if len(parts) == 1 and not (model.device == "cpu" and thread_is_spoiled()):
            return [(work, run(work))]
        asides = _asides(calls, parts) if trains else [{} for _ in parts]
        found = _side_by_side(
            [partial(run, part, asides=aside) for part, aside in zip(parts, asides, strict=True)],
            # Frugal passes are for want of memory.
            at_once=not frugal,
        )
    for aside in asides:
        for call, gradient in aside.items():
            calls[call].adapter.gradient().add_(gradient)
    return list(zip(parts, found, strict=True))


def _may_be_parted(model: BaseModel, calls: Sequence[Call]) -> bool:
    """Not if compiled kernels or captured passes are used, which are for one at a time, nor for an
    operator's loss, which may not be made for several threads."""
    return (
        model.device == "cpu"
        and model.graphs is None
        and not in_use()
        and not any(call.private is not None or call.objective.loss.card.plug_in for call in calls)
    )


def _worthy(tokens: int) -> int:
    """How many strands are worth it."""
    return max(1, min(torch.get_num_threads(), tokens // _LEAST_TOKENS))


def _asides(calls: Sequence[Call], parts: Sequence[Pass]) -> list[dict[int, Tensor]]:
    """Of each part, a gradient for each call that an earlier one has too."""
    seen: set[int] = set()
    found = []
    for part in parts:
        own = {share.call for share in part.shares}
        found.append(
            {call: torch.zeros_like(calls[call].adapter.gradient()) for call in sorted(own & seen)}
        )
        seen |= own
    return found


def _side_by_side(jobs: Sequence[Callable[[], T]], *, at_once: bool = True) -> list[T]:
    """What they return; what the first of those that fail raises, once all have ended.

    Each has a thread of Python's, and in it its share of those of torch's that this one has.

    Args:
        at_once: otherwise each waits for the one before it, and does the same.
    """
    most = torch.get_num_threads()
    threads = max(1, most // len(jobs))
    crew = _crew(most)
    running: list[Future[T]] = []
    try:
        for job in jobs:
            running.append(crew.submit(_with_threads, threads, job))
            if not at_once:
                running[-1].result()
        wait(running)
        return list(map(Future.result, running))
    except BaseException:
        # For want of memory its threads may be spoiled.
        _crew.cache_clear()
        crew.shutdown(wait=False)
        raise
    finally:
        wait(running)
        # An error holds this frame: what its strand held must not be held by way of the future.
        running.clear()
        # Threads to come take over the number that was set last.
        torch.set_num_threads(most)


@cache
def _crew(size: int) -> ThreadPoolExecutor:
    """All started: a thread that cannot be would leave a strand without anybody to wait for it.

    Raises:
        MemoryError: one cannot be; it is mostly for want of memory for its stack.
    """
    crew = ThreadPoolExecutor(size, thread_name_prefix="strand")
    meeting = Barrier(size)
    try:
        for met in [crew.submit(meeting.wait, _START_S) for _ in range(size)]:
            met.result()
    except RuntimeError as error:
        meeting.abort()
        crew.shutdown()
        raise MemoryError(f"{size} threads for the strands of a pass: {error}") from error
    return crew


def _with_threads(threads: int, job: Callable[[], T]) -> T:
    # Asked for first: a thread takes over the process's number when it first uses any.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return job()
