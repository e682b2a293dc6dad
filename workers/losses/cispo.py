"""Importance sampling with clipped weights, where no token's gradient is cut."""

from __future__ import annotations

from workers.losses.policy import CLIP_FRACTION, log_ratio, policy_loss, ratio_bound
from workers.losses.scored import LossTerms, Scored


@policy_loss(
    source="MiniMax 2025, arXiv 2506.13585, equations 4 and 5",
    options=[ratio_bound("clip_low", 0.0), ratio_bound("clip_high", 4.0)],
    metrics=[CLIP_FRACTION],
)
def cispo(scored: Scored, clip_low: float, clip_high: float) -> LossTerms:
    """−Σ sg(clip(r, clip_low, clip_high))·logprob·A, with r = exp(logprob − q); sg has no gradient.

    Terms [S].
    """
    ratios = log_ratio(scored).detach().exp()
    weights = ratios.clamp(clip_low, clip_high)
    terms = -weights * scored.logprobs * scored.inputs["advantages"]
    return LossTerms(terms, {"clip_fraction": weights != ratios})
