"""Distance to a reference."""

from __future__ import annotations

from tensafe.wire.losses import Choice, LossMetric, LossOutput, ReferenceRule
from workers.losses.declaration import loss
from workers.losses.scored import LossTerms, Scored, Statistic


@loss(
    source="Kullback and Leibler 1951",
    options=[
        Choice(
            "direction",
            "reverse: KL(run ‖ reference); forward: KL(reference ‖ run), as in distillation",
            "reverse",
            ("reverse", "forward"),
        )
    ],
    metrics=[LossMetric("kl", "mean", "over the scored tokens, nats")],
    outputs=[LossOutput("kl", "nats")],
    reference=ReferenceRule(),
    needs=lambda options, _: [
        Statistic.KL if options["direction"] == "reverse" else Statistic.FORWARD_KL
    ],
)
def kl(scored: Scored, direction: str) -> LossTerms:
    """Σ w·KL between the run's and the reference's distribution of the next token, exact, over the
    whole vocabulary.

    Terms [S]. The targets matter only for the output `logprobs`.
    """
    distance = scored.kl if direction == "reverse" else scored.forward_kl
    if distance is None:
        raise ValueError("the distance was not computed")
    values = distance.detach()
    return LossTerms(distance, {"kl": values}, {"kl": values})
