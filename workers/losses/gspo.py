"""Group sequence policy optimisation: one ratio for a whole sequence."""

from __future__ import annotations

from tensafe.wire.losses import LossOutput
from workers.losses.policy import CLIP_FRACTION, log_ratio, policy_loss, ratio_bound
from workers.losses.scored import LossTerms, Scored


@policy_loss(
    source="Zheng et al. 2025, arXiv 2507.18071, equations 7 and 13 (GSPO-token)",
    options=[ratio_bound("clip_low", 1 - 3e-4), ratio_bound("clip_high", 1 + 4e-4)],
    metrics=[CLIP_FRACTION],
    outputs=[LossOutput("sequence_ratio", "s", per_datum=True)],
)
def gspo(scored: Scored, clip_low: float, clip_high: float) -> LossTerms:
    """−Σ min(s_t·A, clip(s_t, clip_low, clip_high)·A), with s = exp(mean of logprob − q over the
    sequence's scored tokens) and s_t = sg(s)·exp(logprob_t − sg(logprob_t)); sg has no gradient.

    Terms [S].
    """
    logs = log_ratio(scored).detach()
    counts = logs.new_tensor(scored.lengths)
    sequence = (scored.datum_sums(logs) / counts).exp()
    ratios = scored.spread(sequence) * (scored.logprobs - scored.logprobs.detach()).exp()
    advantages = scored.inputs["advantages"]
    free, clipped = ratios * advantages, ratios.clamp(clip_low, clip_high) * advantages
    return LossTerms(
        -free.minimum(clipped),
        {"clip_fraction": (clipped < free).detach()},
        {"sequence_ratio": sequence},
    )
