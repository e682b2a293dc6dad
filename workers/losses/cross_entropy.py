"""Cross-entropy: supervised fine-tuning, soft targets, label smoothing."""

from __future__ import annotations

from tensafe.wire.losses import Number
from workers.losses.declaration import loss
from workers.losses.scored import LossTerms, Scored, Statistic


@loss(
    source="label smoothing: Szegedy et al. 2016, arXiv 1512.00567, section 7",
    options=[
        Number(
            "label_smoothing",
            "share of the target's weight that is spread evenly over the vocabulary",
            default=0.0,
            low=0.0,
            high=1.0,
        )
    ],
    wide=True,
    divides_by_weights=True,
    needs=lambda options, _: [Statistic.MEAN_LOGPROB] if options["label_smoothing"] else [],
)
def cross_entropy(scored: Scored, label_smoothing: float) -> LossTerms:
    """−Σ w·((1 − ε)·log p(target) + ε·(1/V)·Σ_v log p_v); with K targets for each position, soft
    ones, their weights are the probabilities to reach.

    ε is `label_smoothing`. Terms [S] or [S, K].
    """
    terms = -scored.logprobs
    if scored.mean_logprobs is not None:
        mean = scored.mean_logprobs
        even = mean[:, None] if terms.ndim > 1 else mean
        terms = (1 - label_smoothing) * terms - label_smoothing * even
    return LossTerms(terms)
