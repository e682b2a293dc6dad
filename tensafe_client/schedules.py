"""Learning-rate schedules: the client's, since `optim_step` takes a learning rate per call.

    schedule = cosine(1e-3, total_steps=200, warmup_steps=10)
    for step, batch in enumerate(dataloader, start=1):
        tc.forward_backward(batch)
        tc.optim_step(learning_rate=schedule(step))

Every schedule is a function of the update's number, from 1. Warm-up over W steps multiplies by
min(1, step / W), so the first update has a rate above 0 and update W the full one. A decay begins
after it and would reach its end at update total_steps + 1, so that no update is wasted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensafe_client.checks import check_count, check_number, check_string
from tensafe_client.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each update: warm-up, then a decay to `final_learning_rate`.

    Attributes:
        kind: "constant", "linear" or "cosine".
        learning_rate: the full rate.
        total_steps: updates in all; later ones have `final_learning_rate`. None for "constant".
        warmup_steps: updates of warm-up.
        final_learning_rate: where the decay ends.
    """

    kind: str
    learning_rate: float
    total_steps: int | None = None
    warmup_steps: int = 0
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_learning_rate"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        check_count("warmup_steps", self.warmup_steps)
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps)
        if check_string("kind", self.kind) not in ("constant", "linear", "cosine"):
            raise ConfigError.of("kind", f"must be constant, linear or cosine, got {self.kind!r}")
        if self.kind == "constant":
            for name in ("total_steps", "final_learning_rate"):
                if getattr(self, name):
                    raise ConfigError.of(name, "has no meaning in a constant schedule")
        elif self.total_steps is None or self.total_steps <= self.warmup_steps:
            raise ConfigError.of(
                "total_steps",
                f"must be above warmup_steps ({self.warmup_steps}), got {self.total_steps}",
            )

    def __call__(self, step: int) -> float:
        """Returns the learning rate of update `step`, counted from 1.

        Raises:
            ConfigError: if it is no integer, or below 1.
        """
        if check_count("step", step, bits=64) < 1:
            raise ConfigError.of("step", f"must be 1 or more (updates count from 1), got {step}")
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.total_steps is None:
            return self.learning_rate
        done = min(1.0, (step - 1 - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * left


def constant(learning_rate: float, *, warmup_steps: int = 0) -> Schedule:
    """Returns η(s) = η · min(1, s / W)."""
    return Schedule("constant", learning_rate, warmup_steps=warmup_steps)


def linear(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_learning_rate: float = 0.0,
) -> Schedule:
    """Returns η(s) = η_f + (η − η_f) · (1 − p), p = (s − 1 − W) / (S − W) after warm-up."""
    return Schedule("linear", learning_rate, total_steps, warmup_steps, final_learning_rate)


def cosine(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_learning_rate: float = 0.0,
) -> Schedule:
    """Returns η(s) = η_f + (η − η_f) · (1 + cos πp) / 2, p = (s − 1 − W) / (S − W) after warm-up.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), eq. 5, without restarts.
    """
    return Schedule("cosine", learning_rate, total_steps, warmup_steps, final_learning_rate)
