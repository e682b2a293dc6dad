"""Proximal policy optimisation's clipped objective."""

from __future__ import annotations

from workers.losses.policy import CLIP_FRACTION, log_ratio, policy_loss, ratio_bound
from workers.losses.scored import LossTerms, Scored


@policy_loss(
    source="Schulman et al. 2017, arXiv 1707.06347, equation 7",
    options=[ratio_bound("clip_low", 0.8), ratio_bound("clip_high", 1.2)],
    metrics=[CLIP_FRACTION],
)
def ppo(scored: Scored, clip_low: float, clip_high: float) -> LossTerms:
    """−Σ min(r·A, clip(r, clip_low, clip_high)·A), with r = exp(logprob − q).

    Terms [S].
    """
    advantages = scored.inputs["advantages"]
    ratios = log_ratio(scored).exp()
    free, clipped = ratios * advantages, ratios.clamp(clip_low, clip_high) * advantages
    return LossTerms(-free.minimum(clipped), {"clip_fraction": (clipped < free).detach()})
