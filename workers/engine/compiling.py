"""Compiles the kernels with `torch.compile`, before a worker registers.

One compilation of a few seconds serves all sizes. What does not measure faster than as written is
not adopted. Never beside passes: while it traces, `torch.compile` has the whole process call
modules by way of its tracer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch

from workers.engine.kernels import KERNELS, Kernel

log = logging.getLogger(__name__)

_ROUNDS = 7


class Compiling(StrEnum):
    """Whether kernels are compiled: the values of `--compile`."""

    AUTO = "auto"
    """On a GPU; where it does not go, kernels stay as written, and the log says so. On a CPU not:
    there it gains 2 to 3% for 250 MiB of memory."""
    FIRST = "first"
    """Anywhere; where it does not go, that is an error."""
    OFF = "off"


class CompileError(Exception):
    """This machine cannot compile."""


def compile_if_asked(how: Compiling, device: str, dtype: torch.dtype) -> None:
    """Compiles the kernels, or does not.

    Raises:
        CompileError: with `FIRST`, if it does not go.
    """
    if how is Compiling.OFF or (how is Compiling.AUTO and device == "cpu"):
        return
    log.info("compiling kernels before anything is executed; --compile off does not")
    try:
        compile_kernels(device, dtype)
    except CompileError as error:
        if how is Compiling.FIRST:
            raise
        log.warning("%s; kernels stay as written. --compile off does not try", error)


def compile_kernels(
    device: str, dtype: torch.dtype, kernels: Sequence[Kernel[..., Any]] | None = None
) -> list[str]:
    """Compiles all kernels, then adopts together those that gain.

    Returns:
        The names of those.

    Raises:
        CompileError: saying why, such as a missing C++ compiler.
    """
    begin = time.perf_counter()
    kernels = KERNELS if kernels is None else kernels
    place = torch.device(device)
    try:
        # In this process: a pool of compiler processes would take some hundred MiB each.
        with torch._inductor.config.patch(compile_threads=1), torch.no_grad():
            found = [(each, _compiled(each, place, dtype)) for each in kernels]
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"torch.compile does not work here: {reason[0]}") from error
    gained = [each.name for each, function in found if function is not None]
    for each, function in found:
        each.adopt(function)
    log.info(
        "compiled %d kernels in %.0f s; faster than as written: %s",
        len(found),
        time.perf_counter() - begin,
        ", ".join(gained) or "none",
    )
    return gained


def _compiled(
    kernel: Kernel[..., Any], device: torch.device, dtype: torch.dtype
) -> Callable[..., Any] | None:
    """The compiled form for all its samples; None if it gains nothing."""
    function = torch.compile(kernel.source, dynamic=True, fullgraph=True)
    samples = kernel.samples(device, dtype)
    for sample in samples:
        function(*sample)
    plain, fused = (
        sum(_seconds(form, sample, device) for sample in samples)
        for form in (kernel.plain, function)
    )
    log.debug("%s: %.3f ms as written, %.3f compiled", kernel.name, plain * 1e3, fused * 1e3)
    return function if fused < plain else None


def _seconds(function: Callable[..., Any], sample: tuple[Any, ...], device: torch.device) -> float:
    """Least time of a call: of this thread alone on a CPU, which others use too."""
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = _now(device)
        function(*sample)
        best = min(best, _now(device) - begin)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
