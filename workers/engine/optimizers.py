"""The optimizers of runs, each over its adapter's one vector; several runs step together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tensafe.wire.status import TenSafeFault
from workers.engine.bounds import Bounds, after, norms
from workers.operations import OptimizerSettings

Moments = dict[str, Tensor]
"""By torch's names: vectors [P], and counters []."""


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
        self._state: Moments = {}
        self._bounds: Bounds | None = None
        self._bounds_of = 0

    def state(self) -> Moments:
        """Moments [P] and counters [] by torch's names; empty before the first update."""
        return dict(self._state)

    def restore(self, state: Moments) -> None:
        """Takes over what `state` gave."""
        device = self.weights.device
        self._state = {name: value.to(device, copy=True) for name, value in state.items()}
        self._bounds = None

    def bounds(self, *, anew: bool = False) -> Bounds:
        """Of its numbers; they are looked at if anybody else has changed them, or if asked to."""
        if anew or self._bounds is None or self._bounds_of != self.weights._version:
            names = "exp_avg", "momentum_buffer", "exp_avg_sq"
            vectors = [self._state[name] for name in names if name in self._state]
            self._bounds = Bounds(*norms([self.weights.detach(), *vectors]))
            self._bounds_of = self.weights._version
        return self._bounds

    def stepped(self, moments: Moments, bounds: Bounds) -> None:
        """An update was applied to the weights and to these, after which the bounds hold."""
        self._state = moments
        self._bounds, self._bounds_of = bounds, self.weights._version


@dataclass(frozen=True, slots=True)
class Update:
    """One run's update.

    Attributes:
        gradient: [P], already divided and clipped.
        norm: its L2 norm, finite.
    """

    optimizer: RunOptimizer
    gradient: Tensor
    norm: float
    learning_rate: float
    weight_decay: float


@torch.no_grad()
def step(updates: Sequence[Update]) -> list[bool]:
    """Applies each update of which no number can become NaN or infinite; equal options step as one.

    Returns:
        Which were applied; the others' weights and state are untouched, as are all after an
        exception for want of memory.
    """
    reached = [_reached(update) for update in updates]
    # All the memory that it takes; kernels write in place.
    moments = [
        {} if bounds is None else _moments(update.optimizer)
        for update, bounds in zip(updates, reached, strict=True)
    ]
    for members in _alike(updates, [bounds is not None for bounds in reached]):
        name = updates[members[0]].optimizer.settings.name
        _STEPS[name]([updates[at] for at in members], [moments[at] for at in members])
    for update, own, bounds in zip(updates, moments, reached, strict=True):
        if bounds is not None:
            update.optimizer.stepped(own, bounds)
    return [bounds is not None for bounds in reached]


def _reached(update: Update) -> Bounds | None:
    """None if it may be too large. Bounds widen with each update, so that one may be too large by
    them that is not by the numbers as they are."""
    optimizer = update.optimizer
    for anew in (False, True):
        found = after(
            optimizer.bounds(anew=anew),
            optimizer.settings,
            optimizer.weights.dtype,
            gradient=update.norm,
            rate=update.learning_rate,
            decay=update.weight_decay,
        )
        if found is not None:
            return found
    return None


def _moments(optimizer: RunOptimizer) -> Moments:
    """As they are; before the first update zero."""
    weights, own = optimizer.weights, optimizer.settings
    found = optimizer.state()
    if found:
        return found
    if own.name == "sgd":
        names = ["momentum_buffer"] if own.momentum else []
    else:
        found["step"] = torch.zeros((), device=weights.device)
        names = ["exp_avg", "exp_avg_sq"]
    return found | {name: torch.zeros_like(weights, requires_grad=False) for name in names}


def _alike(updates: Sequence[Update], fit: Sequence[bool]) -> list[list[int]]:
    """Those that fit, by what one call of a fused kernel can make."""
    groups: dict[Hashable, list[int]] = {}
    for index, update in enumerate(updates):
        own = update.optimizer.settings
        options = (own.name, own.beta1, own.beta2, own.eps, own.momentum)
        if fit[index]:
            key = (*options, update.learning_rate, update.weight_decay)
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _step_adam(updates: Sequence[Update], moments: Sequence[Moments]) -> None:
    own = updates[0].optimizer.settings
    beta1, beta2, eps = own.adam()
    adam(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        [each["exp_avg"] for each in moments],
        [each["exp_avg_sq"] for each in moments],
        [],
        [each["step"] for each in moments],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=updates[0].learning_rate,
        weight_decay=updates[0].weight_decay,
        eps=eps,
        maximize=False,
        decoupled_weight_decay=own.name == "adamw",
    )


def _step_sgd(updates: Sequence[Update], moments: Sequence[Moments]) -> None:
    sgd(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        [each.get("momentum_buffer") for each in moments],
        fused=True,
        weight_decay=updates[0].weight_decay,
        momentum=updates[0].optimizer.settings.momentum or 0.0,
        lr=updates[0].learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


_STEPS: dict[str, Callable[[Sequence[Update], Sequence[Moments]], None]] = {
    "adam": _step_adam,
    "adamw": _step_adam,
    "sgd": _step_sgd,
}
