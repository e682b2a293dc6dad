"""The optimizers of a run, over the adapter's one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tensafe.wire.status import TenSafeFault
from workers.operations import OptimizerSettings


class RunOptimizer:
    """AdamW, Adam or SGD of torch, its state readable by name.

    Args:
        settings: which one, with which options.
        weights: float32 [P].
    """

    def __init__(self, settings: OptimizerSettings, weights: nn.Parameter) -> None:
        self.settings = settings
        self._weights = weights
        self._optimizer = _create(settings, weights)

    @torch.no_grad()
    def step(self, gradient: Tensor, learning_rate: float, weight_decay: float) -> bool:
        """Applies one update if all of its numbers are finite in float32.

        Returns:
            Whether it did; if not, weights and state are what they were, as after an exception.
        """
        # An optimizer's options can be finite and still overflow, so only the result tells.
        weights = self._weights.detach().clone()
        state = {name: value.clone() for name, value in self.state().items()}
        applied = False
        (group,) = self._optimizer.param_groups
        group["lr"], group["weight_decay"] = learning_rate, weight_decay
        self._weights.grad = gradient
        try:
            self._optimizer.step()
            applied = self._is_finite()
        finally:
            self._weights.grad = None
            if not applied:
                self._weights.copy_(weights)
                self.restore(state)
        return applied

    def _is_finite(self) -> bool:
        # The largest magnitude is NaN or infinite if any number is, and is one pass over each.
        vectors = [self._weights, *(v for v in self.state().values() if v.ndim)]
        largest = torch.stack([torch.linalg.vector_norm(v, ord=torch.inf) for v in vectors])
        return math.isfinite(float(largest.max()))

    def state(self) -> dict[str, Tensor]:
        """Moments [P] and counters [] by torch's names; empty before the first update."""
        state = self._optimizer.state.get(self._weights, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self._optimizer.state.clear()
        if state:
            self._optimizer.state[self._weights] = {
                name: value.to(self._weights.device, copy=True) for name, value in state.items()
            }


def _create(settings: OptimizerSettings, weights: nn.Parameter) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(
            [weights],
            lr=rate,
            weight_decay=decay,
            momentum=settings.momentum or 0.0,
            fused=True,
        )
    if settings.beta1 is None or settings.beta2 is None or settings.eps is None:
        raise ValueError(f"{settings.name} needs beta1, beta2 and eps")
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw":
        return torch.optim.AdamW(
            [weights], lr=rate, weight_decay=decay, betas=betas, eps=settings.eps, fused=True
        )
    if settings.name == "adam":
        return torch.optim.Adam(
            [weights], lr=rate, weight_decay=decay, betas=betas, eps=settings.eps, fused=True
        )
    raise TenSafeFault(
        "UNSUPPORTED_OPTION",
        f"there is no optimizer {settings.name!r}; use adamw, adam or sgd",
        field="optimizer.name",
    )
