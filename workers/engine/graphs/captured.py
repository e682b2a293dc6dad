"""One captured pass: from token ids to hidden states, and back to the gradients of adapters."""

# ruff: noqa: N803 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.buckets import Buckets
from workers.engine.dropout import pass_dropout
from workers.engine.graphs.adapters import FrameAdapters
from workers.engine.graphs.frames import Frame
from workers.engine.graphs.tapes import Function, Tape
from workers.engine.packing import Packing
from workers.engine.uploads import staged
from workers.operations import Int64

PLAIN_ROWS = 2
"""Of the numbers of a pass without dropout: ids and positions."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is the same for all passes that one graph serves; the numbers are at least theirs.

    Attributes:
        tokens, documents: of a pass.
        longest: tokens of a document.
        runs: segments with an adapter each.
        rank: of an adapter.
        targets: of the adapters, together.
        drops: whether any has dropout.
        trains: whether there is a way back.
        exact: whether its kernels add up in one order.
    """

    tokens: int
    documents: int
    longest: int
    runs: int
    rank: int
    targets: tuple[str, ...]
    drops: bool
    trains: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class Member:
    """One segment of a pass: its adapter, and the token before which it ends."""

    adapter: Adapter
    end: int


class CapturedPass:
    """Passes of one size.

    Args:
        frame: where the adapters are put.
        tape: how the pass is run again; None: by computing it anew.
        frugal: keep only the layers' inputs for the way back; without a tape.

    Attributes:
        nbytes: what it holds beside the frame, and what its tape holds.
    """

    def __init__(
        self,
        model: BaseModel,
        size: Size,
        frame: Frame,
        tape: Tape | None = None,
        *,
        frugal: bool = False,
    ) -> None:
        self.frame = frame
        self._model, self._size, self._tape, self._frugal = model, size, tape, frugal
        device, width = model.device, model.head.weight.shape[1]
        self._numbers = torch.zeros(
            PLAIN_ROWS + 3 * size.drops, size.tokens, dtype=torch.int64, device=device
        )
        self._borders = torch.zeros(size.documents + 1, dtype=torch.int32, device=device)
        self._ends = torch.zeros(size.runs, dtype=torch.int32, device=device)
        self._hidden_ND = torch.zeros(size.tokens, width, dtype=model.dtype, device=device)
        self._slope_ND = torch.zeros_like(self._hidden_ND)
        own = self._numbers, self._borders, self._ends, self._hidden_ND, self._slope_ND
        self.nbytes = sum(tensor.nbytes for tensor in own)
        self._anchor = torch.zeros((), requires_grad=size.trains)
        self._live: tuple[Tensor, FrameAdapters] | None = None
        self._replays: list[Function] = []

    def numbers(self, count: int) -> Tensor:
        """int64 [2 or 5, count]: those of the pass in its place."""
        return self._numbers[:, :count]

    def load(self, numbers: Int64, lengths: Sequence[int], members: Sequence[Member]) -> None:
        """Puts a pass where the graph reads it.

        Args:
            numbers: [2, N] ids and positions, or [5, N] with what `pass_dropout` takes.
            lengths: tokens of each document.
            members: in the order of the tokens, which they cover.
        """
        size, count = self._size, numbers.shape[1]
        whole = np.zeros(self._numbers.shape, np.int64)
        whole[:, :count] = numbers
        self._put(self._numbers, whole)
        self._put(self._borders, borders(lengths, size))
        ends = np.full(size.runs, count, np.int32)
        ends[: len(members)] = [member.end for member in members]
        # The rest is anybody's: its gradient is zero.
        ends[-1] = size.tokens
        self._put(self._ends, ends)
        for row, (adapter, scale) in enumerate(self._scaled(members)):
            self.frame.load(row, adapter, scale)

    def _put(self, where: Tensor, array: np.ndarray[Any, Any]) -> None:
        where.copy_(staged(array, where.device), non_blocking=True)

    def record(self) -> None:
        """Captures the pass in its place, if none was."""
        if self._tape is not None and not self._replays:
            steps = [self._run_forward, self._run_backward]
            self._replays = self._tape.record(steps if self._size.trains else steps[:1])

    def scored(self, places: Tensor, members: Sequence[Member]) -> Tensor:
        """Hidden states [S, D] at those places; the way back adds to the members' gradients.

        Args:
            places: int64 [S], each once.
            members: those that were loaded. They are not kept: this outlives runs.
        """
        found: Tensor = _Scored.apply(  # type: ignore[no-untyped-call]
            self._anchor, self, places, members
        )
        return found

    def _run_forward(self) -> None:
        size, model = self._size, self._model
        dropout = pass_dropout(self._numbers[1:]) if size.drops else None
        adapters = FrameAdapters(
            self.frame, model.dtype, self._ends, size.tokens, dropout, size.trains
        )
        packing = Packing(self._borders, size.longest, Buckets([], model.device))
        with torch.set_grad_enabled(size.trains), model.carrying(adapters):
            live = model.hidden(self._numbers[0], self._numbers[1], packing, frugal=self._frugal)
        self._hidden_ND.copy_(live.detach())
        self._live = (live, adapters) if size.trains else None

    def _run_backward(self) -> None:
        if self._live is None:
            raise RuntimeError("a way back without a way there")
        (live, adapters), self._live = self._live, None
        self.frame.clear_gradients()
        with self._model.carrying(adapters):
            live.backward(self._slope_ND)  # type: ignore[no-untyped-call]

    def forward(self, places: Tensor) -> Tensor:
        """The way there."""
        if self._replays:
            self._replays[0]()
        else:
            self._run_forward()
        return self._hidden_ND.index_select(0, places)

    def backward(self, grad_SD: Tensor, places: Tensor, members: Sequence[Member]) -> None:
        """The way back."""
        self._slope_ND.zero_().index_copy_(0, places, grad_SD)
        if self._replays:
            self._replays[1]()
        else:
            self._run_backward()
        for row, (adapter, scale) in enumerate(self._scaled(members)):
            self.frame.add_gradient(row, adapter, scale)

    def _scaled(self, members: Sequence[Member]) -> list[tuple[Adapter, float]]:
        drops = self._size.drops
        return [(one.adapter, one.adapter.scale(training=drops)) for one in members]


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        captured: CapturedPass,
        places: Tensor,
        members: Sequence[Member],
    ) -> Tensor:
        ctx.rest = captured, members
        ctx.save_for_backward(places)
        return captured.forward(places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        (places,) = ctx.saved_tensors
        captured, members = ctx.rest
        captured.backward(grads[0], places, members)
        return None, None, None, None


def borders(lengths: Sequence[int], size: Size) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32 [documents + 1]: padding is documents of its own, since what no document holds is not
    computed at all."""
    rest = size.tokens - sum(lengths)
    padding = [size.longest] * (rest // size.longest) + [rest % size.longest]
    ends = np.cumsum([0, *lengths, *padding])
    borders = np.full(size.documents + 1, size.tokens, np.int32)
    borders[: len(ends)] = ends
    return borders
