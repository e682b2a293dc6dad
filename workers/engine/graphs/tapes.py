"""How functions of tensors that stay in their places are run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Protocol

import torch

Function = Callable[[], None]


class Tape(Protocol):
    """One way to run them again."""

    def record(self, functions: Sequence[Function]) -> list[Function]:
        """What does the same as each of the functions, which belong together in this order."""


class CudaTape:
    """As CUDA graphs.

    They share the memory of what they compute on the way: only one may be under way.

    Args:
        device: where the functions compute; it need not be the thread's current one.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream(self._device)

    def record(self, functions: Sequence[Function]) -> list[Function]:
        """Runs them twice: what libraries set up when first called cannot be captured."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Around the captures too: one that fails does not go back to the stream of before.
            with torch.cuda.stream(self._stream):
                for function in functions:
                    function()
                current.wait_stream(self._stream)
                return [self._captured(function) for function in functions]

    def _captured(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the device.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
        except Exception:
            # Where the end of the capture fails too, torch's allocator would hold it to be under
            # way for ever, and give no memory back.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise
        return graph.replay


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: libraries keep workspaces for each that they see."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
