"""Direct reward optimisation: a quadratic penalty in place of a ratio."""

from __future__ import annotations

from tensafe.wire.losses import Number
from workers.losses.policy import log_ratio, policy_loss
from workers.losses.scored import LossTerms, Scored


@policy_loss(
    source="Richemond et al. 2024, arXiv 2405.19107",
    options=[Number("beta", "strength of the penalty", 0.05, 0.0, 1e6)],
)
def dro(scored: Scored, beta: float) -> LossTerms:
    """−Σ (logprob·A − ½·beta·(logprob − q)²).

    Terms [S].
    """
    penalty = 0.5 * beta * log_ratio(scored).square()
    return LossTerms(penalty - scored.logprobs * scored.inputs["advantages"])
