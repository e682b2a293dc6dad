"""What a private run may be asked, and what it tells; the same on every backend.

Losses are those in which no example has a part in another's gradient. What was not noised, and is
not public, is told only where the run's settings say so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from workers.operations import (
    Batch,
    LossOutcome,
    LossRequest,
    Metric,
    PrivacySettings,
    StepRequest,
)
from workers.window import Window

_LOSSES = ("cross_entropy",)
_REDUCTIONS = (Reduction.SEQUENCE_MEAN, Reduction.SUM)
_PUBLIC_OF_CALLS = frozenset({"tokens"})
"""How many tokens came is the caller's own knowledge."""
_PUBLIC_OF_UPDATES = frozenset({"grad_norm", "learning_rate"})
"""Of an update the gradient was noised, and the rate is the caller's."""


def private_request(request: LossRequest) -> LossRequest:
    """With the reduction filled in: each example's own token mean, summed.

    A batch in which nothing is scored adds nothing, and is no error: that would tell of its rows.
    Nor is one without a row. In the place of both comes one that is checked like all others.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION.
    """
    if request.loss not in _LOSSES:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"loss.name: a private run cannot use {request.loss!r}, since its inputs may depend on "
            f"other examples; use {', '.join(_LOSSES)}",
            field="loss.name",
        )
    reduction = request.reduction or Reduction.SEQUENCE_MEAN
    if reduction not in _REDUCTIONS:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"loss.reduction: a private run cannot use {reduction}, since each example's gradient "
            f"would depend on the others' lengths; use {' or '.join(_REDUCTIONS)}",
            field="loss.reduction",
        )
    return replace(request, batch=_scored(request.batch), reduction=reduction)


def _scored(batch: Batch) -> Batch:
    """One without a scored position as one that is checked like all others, and does not count."""
    if batch.is_empty:
        one = np.zeros(1, np.int32)
        return Batch(np.array([0, 1], np.int64), one, one, units=np.full(1, -1, np.int32))
    weights, targets = batch.weights, batch.target_tokens
    if weights is None or targets is None or weights.any():
        return batch
    return replace(
        batch,
        target_tokens=np.zeros_like(targets),
        weights=np.ones_like(weights),
        units=np.full(len(batch.offsets) - 1, -1, np.int32),
    )


def check_forward(privacy: PrivacySettings | None) -> None:
    """Refuses the `forward` of a run that tells nothing raw.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION.
    """
    if privacy is not None and not privacy.tells_raw:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            "forward would tell losses and log-probabilities without noise; create the run with "
            "metrics=raw_to_owner, or evaluate a saved state of it in a run without dp",
            field="dp.metrics",
        )


def check_charged(privacy: PrivacySettings | None, window: Window, request: StepRequest) -> None:
    """Refuses an update of a private run that nothing was written down for; nothing has changed.

    Raises:
        TenSafeFault: INTERNAL.
    """
    if privacy is not None and not request.charged and (request.closes or window.awaits_last_call):
        raise TenSafeFault(
            "INTERNAL",
            "a private update came without a charge; tell the operator, whose log has it",
        )


def released_call(privacy: PrivacySettings | None, outcome: LossOutcome) -> LossOutcome:
    """What the owner is told of a forward_backward."""
    if privacy is None or privacy.tells_raw:
        return outcome
    return LossOutcome([m for m in outcome.metrics if m.name in _PUBLIC_OF_CALLS], {})


def released_update(privacy: PrivacySettings | None, metrics: list[Metric]) -> list[Metric]:
    """What the owner is told of an applied update, beside its `PrivateRelease`."""
    if privacy is None or privacy.tells_raw:
        return metrics
    return [metric for metric in metrics if metric.name in _PUBLIC_OF_UPDATES]
