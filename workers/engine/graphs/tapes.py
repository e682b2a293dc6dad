"""How functions of tensors that stay in their places are run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Function = Callable[[], None]


class Tape(Protocol):
    """One way to run them again."""

    def record(self, functions: Sequence[Function]) -> list[Function]:
        """What does the same as each of the functions, which belong together in this order."""


class Direct:
    """By calling them."""

    def record(self, functions: Sequence[Function]) -> list[Function]:
        """The functions themselves."""
        return list(functions)


class CudaTape:
    """As CUDA graphs.

    They share the memory of what they compute on the way: only one may be under way.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, functions: Sequence[Function]) -> list[Function]:
        """Runs them twice: what libraries set up when first called cannot be captured."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for function in functions:
                function()
        current.wait_stream(self._stream)
        graphs = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
            graphs.append(graph)
        return [graph.replay for graph in graphs]
