"""Policy gradient with importance sampling."""

from __future__ import annotations

from workers.losses.policy import log_ratio, policy_loss
from workers.losses.scored import LossTerms, Scored


@policy_loss(source="Degris, White and Sutton 2012, arXiv 1205.4839; REINFORCE where r = 1")
def importance_sampling(scored: Scored) -> LossTerms:
    """−Σ r·A, with r = exp(logprob − q).

    Terms [S].
    """
    return LossTerms(-log_ratio(scored).exp() * scored.inputs["advantages"])
