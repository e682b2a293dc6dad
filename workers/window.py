"""The accumulation window between two applied updates: counting, poisoning, closing.

Pure bookkeeping, shared by every backend; the gradients themselves live elsewhere. A window closes
at every N-th `optim_step` (N = gradient_accumulation_steps), whether that call succeeds or not. The
one exception is MAX_STEPS_REACHED, which changes nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from workers.operations import Combine, Metric

_FORMER = {"weighted_mean": Reduction.TOKEN_MEAN}
"""A name that saved states may still have."""


@dataclass(frozen=True, slots=True)
class ClosedWindow:
    """Totals of a window at its close.

    Attributes:
        defined: metrics that its losses define, each combined over its calls.
    """

    reduction: Reduction
    loss_sum: float
    denominator: float
    tokens: int
    compute_ms: float
    defined: list[Metric]

    @property
    def divisor(self) -> float:
        """What the summed gradient is divided by."""
        return divisor(self.reduction, self.denominator)

    def metrics(self, grad_norm: float, learning_rate: float, step_ms: float) -> list[Metric]:
        """Metrics of the update, all but queue_ms; `step_ms` is the closing call's own time."""
        compute_ms = self.compute_ms + step_ms
        rate = self.tokens / compute_ms * 1e3 if compute_ms > 0 else 0.0
        return [
            *scored_loss(self.reduction, self.loss_sum, self.denominator),
            Metric("grad_norm", grad_norm, Combine.LAST),
            Metric("learning_rate", learning_rate, Combine.LAST),
            Metric("tokens", self.tokens, Combine.SUM),
            Metric("tokens_per_second", rate, Combine.LAST),
            Metric("compute_ms", compute_ms, Combine.SUM),
            *self.defined,
        ]


def divisor(reduction: Reduction, denominator: float) -> float:
    """1 under `sum`."""
    return 1.0 if reduction is Reduction.SUM else denominator


def loss_metric(reduction: Reduction, loss_sum: float, denominator: float) -> Metric:
    """The reported loss: a mean whose weight is its denominator, or the plain sum."""
    if reduction is Reduction.SUM:
        return Metric("loss", loss_sum, Combine.SUM)
    return Metric("loss", loss_sum / denominator, Combine.MEAN, denominator)


def scored_loss(reduction: Reduction, loss_sum: float, denominator: float) -> list[Metric]:
    """`loss_metric`, if anything was scored, as it need not be in private runs."""
    return [loss_metric(reduction, loss_sum, denominator)] if denominator else []


def combine(metrics: Iterable[Metric]) -> list[Metric]:
    """One metric for each name, its values combined as it says; in the order of first sight."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        before = found.get(metric.name)
        found[metric.name] = metric if before is None else _both(before, metric)
    return list(found.values())


def _both(one: Metric, two: Metric) -> Metric:
    if one.combine is not two.combine:
        raise ValueError(f"metric {one.name} combines in two ways, {one.combine!r} and another")
    weight = one.weight + two.weight
    if one.combine is Combine.SUM:
        value = one.value + two.value
    elif one.combine is Combine.MEAN:
        value = (one.value * one.weight + two.value * two.weight) / weight
    elif one.combine is Combine.LAST:
        return two
    else:
        value = (min if one.combine is Combine.MIN else max)(one.value, two.value)
    return Metric(one.name, value, one.combine, weight)


class Window:
    """Counters of one run.

    Args:
        closes_empty: an optim_step applies without any forward_backward before it, as in private
            runs, where whether a batch was empty is nobody's business.

    Attributes:
        step: applied updates.
        calls: optim_step calls since the last close.
        backwards: forward_backward calls that added a gradient since then.
    """

    def __init__(
        self,
        accumulation_steps: int = 1,
        max_steps: int | None = None,
        closes_empty: bool = False,
    ) -> None:
        self._accumulation_steps = accumulation_steps
        self._max_steps = max_steps
        self._closes_empty = closes_empty
        self.step = 0
        self.clear()

    def clear(self) -> None:
        """Forgets the window, not `step`; the caller clears its accumulator."""
        self.calls = 0
        self.backwards = 0
        self.poisoned = False
        self.reduction: Reduction | None = None
        self.loss_sum = 0.0
        self.denominator = 0.0
        self.tokens = 0
        self.compute_ms = 0.0
        self.defined: list[Metric] = []

    @property
    def is_open(self) -> bool:
        """Whether it holds a gradient."""
        return self.backwards > 0

    def admit(self, reduction: Reduction) -> None:
        """Checks, before any work, that a forward_backward may join.

        Raises:
            TenSafeFault: MIXED_REDUCTION. The caller poisons the window.
        """
        if self.reduction is not None and reduction is not self.reduction:
            raise TenSafeFault(
                "MIXED_REDUCTION",
                f"this accumulation window was begun with the {self.reduction} reduction and "
                f"cannot take {reduction}; call optim_step first, or use one reduction",
                window_reduction=self.reduction,
                reduction=reduction,
            )

    def add(
        self,
        reduction: Reduction,
        *,
        loss_sum: float,
        denominator: float,
        tokens: int,
        compute_ms: float,
        defined: Sequence[Metric] = (),
    ) -> None:
        """Counts a forward_backward whose gradient was added.

        Args:
            defined: metrics that its loss defines.
        """
        self.reduction = reduction
        self.backwards += 1
        self.loss_sum += loss_sum
        self.denominator += denominator
        self.tokens += tokens
        self.compute_ms += compute_ms
        self.defined = combine([*self.defined, *defined])

    def poison(self) -> None:
        """A forward_backward of this window did not contribute."""
        self.poisoned = True

    @property
    def awaits_last_call(self) -> bool:
        """Whether the next optim_step closes the window."""
        return self.calls + 1 >= self._accumulation_steps

    def call(self, *, closes: bool = False) -> ClosedWindow | None:
        """Counts one optim_step; None if it does not close the window.

        Args:
            closes: it does, however many calls the window has had.

        A close, failed or not, leaves an empty window: the caller clears its accumulator. After a
        close that applied, the caller counts it with `applied`.

        Raises:
            TenSafeFault: MAX_STEPS_REACHED, and nothing has changed; WINDOW_POISONED or
                EMPTY_WINDOW, and the window is closed.
        """
        if self._max_steps is not None and self.step >= self._max_steps:
            raise TenSafeFault(
                "MAX_STEPS_REACHED",
                f"all {self._max_steps} updates of max_steps were applied; create a run with a "
                "larger max_steps to go on from a saved state",
                max_steps=self._max_steps,
            )
        if not (closes or self.awaits_last_call):
            self.calls += 1
            return None
        poisoned, backwards, reduction = self.poisoned, self.backwards, self.reduction
        closed = ClosedWindow(
            reduction or Reduction.TOKEN_MEAN,
            self.loss_sum,
            self.denominator,
            self.tokens,
            self.compute_ms,
            self.defined,
        )
        self.clear()
        if poisoned:
            raise TenSafeFault(
                "WINDOW_POISONED",
                "a forward_backward of this accumulation window was refused, failed or was "
                "cancelled; the window's gradients were dropped and no update was made; repeat "
                "the window's forward_backward calls",
            )
        if not (backwards or self._closes_empty):
            raise TenSafeFault(
                "EMPTY_WINDOW",
                "no forward_backward came before this optim_step; call forward_backward first",
            )
        return closed

    def applied(self) -> int:
        """Counts an applied update; returns the new step."""
        self.step += 1
        return self.step

    def as_json(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {
            "step": self.step,
            "calls": self.calls,
            "backwards": self.backwards,
            "poisoned": self.poisoned,
            "reduction": self.reduction,
            "loss_sum": self.loss_sum,
            "denominator": self.denominator,
            "tokens": self.tokens,
            "compute_ms": self.compute_ms,
            "defined": [asdict(metric) for metric in self.defined],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over the counters of a checkpoint."""
        self.step = int(saved["step"])
        self.calls = int(saved["calls"])
        self.backwards = int(saved["backwards"])
        self.poisoned = bool(saved["poisoned"])
        reduction = saved["reduction"]
        self.reduction = None if reduction is None else Reduction(_FORMER.get(reduction, reduction))
        self.loss_sum = float(saved["loss_sum"])
        self.denominator = float(saved["denominator"])
        self.tokens = int(saved["tokens"])
        self.compute_ms = float(saved["compute_ms"])
        self.defined = [
            Metric(**{**metric, "combine": Combine(metric["combine"])})
            for metric in saved.get("defined", [])
        ]
