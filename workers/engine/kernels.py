"""Functions of several element-wise operations: as written, or compiled into one sweep over memory.

As written they run anywhere. What `compiling` has compiled and adopted is used inside `fused()`.
Products are never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

Samples = Callable[[torch.device, torch.dtype], Sequence[tuple[Any, ...]]]
"""Arguments on a device and in a model's type, for each variant of a kernel that shall exist."""


class Kernel(Generic[P, T]):
    """One function of tensors.

    Attributes:
        plain: as written.
        samples: what to compile it for; sizes mean nothing, since all are dynamic.
        source: what is compiled: the same, or another way to write it that compilers fuse.
    """

    def __init__(
        self, plain: Callable[P, T], samples: Samples, source: Callable[..., Any] | None = None
    ) -> None:
        self.plain = plain
        self.samples = samples
        self.source: Callable[..., Any] = source or plain
        self.name = plain.__name__.strip("_")
        self._fused: Callable[P, T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._fused is None or not _switch.on:
            return self.plain(*args, **kwargs)
        # Compiled code is for one kind of tensor: not a parameter, and none that needs a gradient.
        bare: Any = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        return self._fused(*bare, **kwargs)

    @property
    def is_fused(self) -> bool:
        """Whether there is a compiled form to use."""
        return self._fused is not None

    def adopt(self, fused: Callable[P, T] | None) -> None:
        """Takes a compiled form into use, or goes back to the plain one."""
        self._fused = fused


KERNELS: list[Kernel[..., Any]] = []
"""All that there are."""

_LEAST_TOKENS = 256
"""Of a pass: for fewer, the checks before a compiled call (0.1 ms) cost more than it saves. A step
of 8 x 16 tokens took 2.5% longer."""


@dataclass(slots=True)
class _Switch:
    """Process-wide, since a GPU's backward pass runs in threads of its own; one thread executes
    passes.

    Attributes:
        on: whether the pass at hand uses compiled forms.
    """

    on: bool = False


_switch = _Switch()


def kernel(
    samples: Samples, source: Callable[..., Any] | None = None
) -> Callable[[Callable[P, T]], Kernel[P, T]]:
    """Makes a function a kernel."""

    def register(plain: Callable[P, T]) -> Kernel[P, T]:
        KERNELS.append(made := Kernel(plain, samples, source))
        return made

    return register


def in_use() -> bool:
    """Whether the pass at hand uses compiled forms, which are for the number of CPU threads that
    they were made with."""
    return _switch.on


@contextmanager
def fused(tokens: int, *, exact: bool) -> Iterator[None]:
    """Passes inside use the compiled forms that there are.

    What a compiled form was not made for runs as written: nothing is compiled on a step's path.

    Args:
        tokens: of the pass.
        exact: never, for deterministic runs: their bits must not depend on when a kernel is ready,
            nor on the order in which a device's units get to add.
    """
    ready = not exact and tokens >= _LEAST_TOKENS and any(each.is_fused for each in KERNELS)
    stance = torch.compiler.set_stance("eager_on_recompile") if ready else nullcontext()
    before, _switch.on = _switch.on, ready
    try:
        with stance, _one_order() if exact else nullcontext():
            yield
    finally:
        _switch.on = before


@contextmanager
def _one_order() -> Iterator[None]:
    """Kernels inside add up in one order each time. A GPU's fastest do not: in attention's backward
    pass, say, blocks add to one sum as they come. A kernel that cannot is an error."""
    settings: Any = torch.utils.deterministic
    wanted, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # All memory is written before it is read; to fill it first would only cost time.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn)
        settings.fill_uninitialized_memory = fills
