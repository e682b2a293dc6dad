"""Devices that run out of memory, as the CPU's allocator says it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _no_memory() -> RuntimeError:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")


@dataclass
class Passes:
    """What went through a model.

    Attributes:
        tokens: of each forward pass that was begun.
        faults: how many of them ran out of memory, in either direction.
        most_bytes: that one of them kept for its backward pass.
    """

    tokens: list[int] = field(default_factory=list)
    faults: int = 0
    most_bytes: int = 0


@contextmanager
def fault_at(body: nn.Module, passes: set[int], *, backward: bool) -> Iterator[Passes]:
    """These passes, counted from 0, fail within the last layer, going forward or backward."""
    seen = Passes()

    def fail(*_: object) -> None:
        seen.faults += 1
        raise _no_memory()

    def begin(_module: nn.Module, _args: object, options: dict[str, torch.Tensor]) -> None:
        seen.tokens.append(options["input_ids"].numel())

    def leave(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if len(seen.tokens) - 1 in passes:
            if not backward:
                fail()
            elif output.requires_grad:
                output.register_hook(fail)

    handles = [
        body.register_forward_pre_hook(begin, with_kwargs=True),
        body.layers[-1].register_forward_hook(leave),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capacity(body: nn.Module, saved_bytes: float = math.inf) -> Iterator[Passes]:
    """A pass fails when it keeps more for its backward pass than `saved_bytes`."""
    seen = Passes()
    kept: dict[int, int] = {}
    frozen = {parameter.untyped_storage().data_ptr() for parameter in body.parameters()}

    def begin(_module: nn.Module, _args: object, options: dict[str, torch.Tensor]) -> None:
        seen.tokens.append(options["input_ids"].numel())
        kept.clear()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        seen.most_bytes = max(seen.most_bytes, sum(kept.values()))
        if sum(kept.values()) > saved_bytes:
            seen.faults += 1
            raise _no_memory()
        return tensor

    handle = body.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield seen
    finally:
        handle.remove()


class Held(TorchDispatchMode):
    """What is in memory of all that was computed in here, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {_place(part) for part in tree_leaves((args, kwargs)) if _is_tensor(part)}
        found = func(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if _is_tensor(part) and _place(part) not in known | self._sizes.keys():
                storage = part.untyped_storage()
                self._sizes[_place(part)] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, _place(part), None)
        return found

    @property
    def bytes(self) -> int:
        """Now."""
        return sum(self._sizes.values())


class Exhausted(TorchDispatchMode):
    """From some operation on, counted from 0, whatever takes memory fails."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first
        self._seen = 0
        self.faults = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen += 1
        in_place = func.overloadpacket.__name__.endswith("_")
        if self._seen > self._first and not (func.is_view or in_place):
            self.faults += 1
            raise _no_memory()
        return func(*args, **(kwargs or {}))


def _is_tensor(part: object) -> bool:
    return isinstance(part, torch.Tensor)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
