"""The optimizers of runs, each over its adapter's one vector; several runs step together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tensafe.wire.status import TenSafeFault
from workers.engine.bounds import Bounds, after
from workers.engine.magnitudes import l2_norms
from workers.engine.memory import memory_faults
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
        self._bounds_version = 0

    def state(self) -> Moments:
        """Moments [P] and counters [] by torch's names; empty before the first update."""
        return dict(self._state)

    def restore(self, state: Moments) -> None:
        """Takes over what `state` gave."""
        device = self.weights.device
        self._state = {name: value.to(device, copy=True) for name, value in state.items()}
        self._bounds = None

    @property
    def bounds(self) -> Bounds | None:
        """Of its numbers; None if anybody else than `step` has changed them."""
        return self._bounds if self._bounds_version == self.weights._version else None

    def holds(self, bounds: Bounds, moments: Moments) -> None:
        """These are its moments, and none of its numbers is larger."""
        self._state = moments
        self._bounds, self._bounds_version = bounds, self.weights._version


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


@dataclass(frozen=True, slots=True)
class _Ready:
    """An update with all the memory that it takes, and the bounds that hold after it."""

    update: Update
    moments: Moments
    bounds: Bounds

    @property
    def options(self) -> Hashable:
        """Equal for those that one call of a fused kernel can make."""
        update, own = self.update, self.update.optimizer.settings
        options = own.name, own.beta1, own.beta2, own.eps, own.momentum
        return *options, update.learning_rate, update.weight_decay


@torch.no_grad()
def step(updates: Sequence[Update]) -> list[bool | Exception]:
    """Applies each update of which no number can become NaN or infinite; equal options step as one,
    to the bits of torch's fused kernels.

    Returns:
        Which were applied, or why one could not be, such as OUT_OF_MEMORY for its first moments;
        the weights and state of those that were not are untouched.
    """
    outcomes: list[bool | Exception] = [False] * len(updates)
    groups: dict[Hashable, list[tuple[int, _Ready]]] = {}
    for index, (update, bounds) in enumerate(zip(updates, _reached(updates), strict=True)):
        if bounds is None:
            continue
        try:
            with memory_faults("optim_step"):
                ready = _Ready(update, _moments(update.optimizer), bounds)
            groups.setdefault(ready.options, []).append((index, ready))
        except TenSafeFault as fault:
            outcomes[index] = fault
    for members in groups.values():
        name = members[0][1].update.optimizer.settings.name
        try:
            with memory_faults("optim_step"):
                _STEPS[name]([ready for _, ready in members])
        except Exception as error:  # of this group alone: another may have stepped
            for index, _ in members:
                outcomes[index] = error
            continue
        for index, ready in members:
            ready.update.optimizer.holds(ready.bounds, ready.moments)
            outcomes[index] = True
    return outcomes


def _reached(updates: Sequence[Update]) -> list[Bounds | None]:
    """What holds after each; None if it may be too large."""
    _look_at([update.optimizer for update in updates if update.optimizer.bounds is None])
    found = [_after(update) for update in updates]
    # Bounds widen with each update: by the numbers as they are it may not be too large.
    wide = [index for index, bounds in enumerate(found) if bounds is None]
    _look_at([updates[index].optimizer for index in wide])
    for index in wide:
        found[index] = _after(updates[index])
    return found


def _look_at(optimizers: Sequence[RunOptimizer]) -> None:
    """Finds their bounds, in one transfer from the device."""
    vectors = {
        (index, name): value
        for index, optimizer in enumerate(optimizers)
        for name, value in (("weights", optimizer.weights.detach()), *optimizer.state().items())
        if value.ndim
    }
    sizes = dict(zip(vectors, l2_norms([*vectors.values()]), strict=True)) if vectors else {}
    for index, optimizer in enumerate(optimizers):
        first = "momentum_buffer" if optimizer.settings.name == "sgd" else "exp_avg"
        bounds = Bounds(
            weights=sizes[index, "weights"],
            first=sizes.get((index, first), 0.0),
            second=sizes.get((index, "exp_avg_sq"), 0.0),
        )
        optimizer.holds(bounds, optimizer.state())


def _after(update: Update) -> Bounds | None:
    optimizer = update.optimizer
    if optimizer.bounds is None:
        raise RuntimeError("an optimizer's bounds are not known")
    return after(
        optimizer.bounds,
        optimizer.settings,
        optimizer.weights.dtype,
        gradient=update.norm,
        rate=update.learning_rate,
        decay=update.weight_decay,
    )


def _moments(optimizer: RunOptimizer) -> Moments:
    """As they are; before the first update zero."""
    found = optimizer.state()
    if not found:
        weights = optimizer.weights
        for name in moment_names(optimizer.settings):
            like = torch.zeros((), device=weights.device) if name == "step" else weights
            found[name] = torch.zeros_like(like, requires_grad=False)
    return found


def moment_names(settings: OptimizerSettings) -> list[str]:
    """What an optimizer keeps from its first update on."""
    if settings.name == "sgd":
        return ["momentum_buffer"] if settings.momentum else []
    return ["step", "exp_avg", "exp_avg_sq"]


def _step_adam(ready: Sequence[_Ready]) -> None:
    updates, own = [each.update for each in ready], ready[0].update.optimizer.settings
    beta1, beta2, eps = own.adam()
    adam(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        [each.moments["exp_avg"] for each in ready],
        [each.moments["exp_avg_sq"] for each in ready],
        [],
        [each.moments["step"] for each in ready],
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


def _step_sgd(ready: Sequence[_Ready]) -> None:
    updates = [each.update for each in ready]
    sgd(
        [update.optimizer.weights for update in updates],
        [update.gradient for update in updates],
        [each.moments.get("momentum_buffer") for each in ready],
        fused=True,
        weight_decay=updates[0].weight_decay,
        momentum=updates[0].optimizer.settings.momentum or 0.0,
        lr=updates[0].learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


_STEPS: dict[str, Callable[[Sequence[_Ready]], None]] = {
    "adam": _step_adam,
    "adamw": _step_adam,
    "sgd": _step_sgd,
}
