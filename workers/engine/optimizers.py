"""The optimizers of runs, each over its adapter's one vector; several runs step together."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tensafe.wire.status import TenSafeFault
from workers.engine.undo import copies
from workers.operations import OptimizerSettings

_WEIGHTS = "weights"


class RunOptimizer:
    """State of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), Adam or SGD.

    Args:
        settings: which one, with which options.
        weights: [P].
    """

    def __init__(self, settings: OptimizerSettings, weights: nn.Parameter) -> None:
        if settings.name not in _STEPS:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"there is no optimizer {settings.name!r}; use {', '.join(sorted(_STEPS))}",
                field="optimizer.name",
            )
        self.settings = settings
        self.weights = weights
        self._state: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Moments [P] and counters [] by torch's names; empty before the first update."""
        return dict(self._state)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        device = self.weights.device
        self._state = {name: value.to(device, copy=True) for name, value in state.items()}

    @torch.no_grad()
    def take_back(self, before: Mapping[str, Tensor]) -> None:
        """Makes weights and state what they were when they were copied. It takes no memory: that
        may be what the update was short of."""
        for name in self._state.keys() - before.keys():
            del self._state[name]
        for name, value in (*self._state.items(), (_WEIGHTS, self.weights)):
            value.copy_(before[name])


@dataclass(frozen=True, slots=True)
class Update:
    """One run's update: gradient [P], already divided and clipped."""

    optimizer: RunOptimizer
    gradient: Tensor
    learning_rate: float
    weight_decay: float


@torch.no_grad()
def step(updates: Sequence[Update]) -> list[bool]:
    """Applies each update whose numbers are all finite in its type; equal options step as one.

    Returns:
        Which were applied; the others' weights and state are what they were, as are all after an
        exception.
    """
    # An optimizer's options can be finite and still overflow, so only the result tells.
    before = copies([_tensors(update.optimizer) for update in updates])
    applied = [False] * len(updates)
    try:
        for members in _alike(updates):
            own = members[0].optimizer.settings
            _STEPS[own.name](members)
        applied = _finite(updates)
    finally:
        for update, done, was in zip(updates, applied, before, strict=True):
            if not done:
                update.optimizer.take_back(was)
    return applied


def _tensors(optimizer: RunOptimizer) -> dict[str, Tensor]:
    return {_WEIGHTS: optimizer.weights.detach(), **optimizer.state()}


def _alike(updates: Sequence[Update]) -> list[list[Update]]:
    """Updates that one call of a fused kernel can make."""
    groups: dict[Hashable, list[Update]] = {}
    for update in updates:
        own = update.optimizer.settings
        # SGD's first step makes its momentum, which is all tensors' or none's.
        fresh = not update.optimizer.state()
        options = (own.name, own.beta1, own.beta2, own.eps, own.momentum, fresh)
        groups.setdefault((*options, update.learning_rate, update.weight_decay), []).append(update)
    return list(groups.values())


def _finite(updates: Sequence[Update]) -> list[bool]:
    """Whether all of each run's numbers are finite; one transfer from the device."""
    numbers = [
        [u.optimizer.weights, *(v for v in u.optimizer.state().values() if v.ndim)] for u in updates
    ]
    sums = torch.stack([torch.stack([v.sum() for v in vectors]).sum() for vectors in numbers])
    # A sum is NaN or infinite if any number is, and takes a fraction of a norm's time. Sums of
    # huge numbers overflow too, so what looks broken is looked at again.
    return [
        math.isfinite(found) or all(bool(torch.isfinite(v).all()) for v in vectors)
        for found, vectors in zip(sums.tolist(), numbers, strict=True)
    ]


def _step_adam(updates: Sequence[Update]) -> None:
    own = updates[0].optimizer.settings
    if own.beta1 is None or own.beta2 is None or own.eps is None:
        raise ValueError(f"{own.name} needs beta1, beta2 and eps")
    states = []
    for update in updates:
        weights, state = update.optimizer.weights, update.optimizer._state
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state["exp_avg"] = torch.zeros_like(weights, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(weights, requires_grad=False)
        states.append(state)
    adam(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=own.beta1,
        beta2=own.beta2,
        lr=updates[0].learning_rate,
        weight_decay=updates[0].weight_decay,
        eps=own.eps,
        maximize=False,
        decoupled_weight_decay=own.name == "adamw",
    )


def _step_sgd(updates: Sequence[Update]) -> None:
    momentum = updates[0].optimizer.settings.momentum or 0.0
    states = [update.optimizer._state for update in updates]
    buffers: list[Any] = [state.get("momentum_buffer") for state in states]
    sgd(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        buffers,
        fused=True,
        weight_decay=updates[0].weight_decay,
        momentum=momentum,
        lr=updates[0].learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    if momentum:
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer


_STEPS: dict[str, Callable[[Sequence[Update]], None]] = {
    "adam": _step_adam,
    "adamw": _step_adam,
    "sgd": _step_sgd,
}
