"""Losses: each a small function, and a card that says what it takes and gives.

To write one, see `workers.losses.declaration`; `--loss NAME=module:function` plugs it in.
"""

from tensafe.wire.losses import (
    Choice,
    Flag,
    LossCard,
    LossInput,
    LossMetric,
    LossOutput,
    Number,
    Reduction,
    ReferenceRule,
)
from workers.losses.declaration import Loss, LossDeclarationError, loss
from workers.losses.policy import policy_loss
from workers.losses.registry import LossLoadError, LossRegistry, load_losses
from workers.losses.scored import LossTerms, Scored, Statistic

__all__ = [
    "Choice",
    "Flag",
    "Loss",
    "LossCard",
    "LossDeclarationError",
    "LossInput",
    "LossLoadError",
    "LossMetric",
    "LossOutput",
    "LossRegistry",
    "LossTerms",
    "Number",
    "Reduction",
    "ReferenceRule",
    "Scored",
    "Statistic",
    "load_losses",
    "loss",
    "policy_loss",
]
