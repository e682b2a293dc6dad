"""Losses that an operator might plug in; workers of tests import them by name."""

from __future__ import annotations

from workers.losses import (
    Flag,
    LossInput,
    LossMetric,
    LossOutput,
    LossTerms,
    Number,
    Scored,
    Statistic,
    loss,
)


@loss(
    source="Huber 1964, Annals of Mathematical Statistics 35",
    inputs=[
        LossInput("wanted", "the log-probability to reach"),
        LossInput("kinds", "only targets of kind 1 count", dtype="int32", required=False),
    ],
    options=[
        Number("delta", "where it becomes linear", 1.0, low=1e-6, high=1e6),
        Flag("entropy", "also tell the entropy"),
    ],
    metrics=[LossMetric("distance", "mean", "|logprob - wanted|")],
    outputs=[LossOutput("entropy", "nats; with the option")],
    needs=lambda options, _: [Statistic.ENTROPY] if options["entropy"] else [],
)
def huber(scored: Scored, delta: float, entropy: bool) -> LossTerms:
    """Σ w·huber(logprob − wanted).

    Terms [S].
    """
    distance = (scored.logprobs - scored.inputs["wanted"]).abs()
    near = distance.clamp(max=delta)
    terms = near * (distance - near / 2)
    if "kinds" in scored.inputs:
        terms = terms * (scored.inputs["kinds"] == 1)
    outputs = {} if scored.entropy is None else {"entropy": scored.entropy.detach()}
    return LossTerms(terms, {"distance": distance.detach()}, outputs)


@loss(per="sequence")
def longest(scored: Scored) -> LossTerms:
    """Σ −logprob(sequence), each by its own length squared."""
    lengths = scored.logprobs.new_tensor(scored.lengths)
    return LossTerms(-scored.datum_sums(scored.logprobs) / lengths**2)


@loss(metrics=[LossMetric("clip_fraction", "max", "not as the built-in losses have it")])
def contradicting(scored: Scored) -> LossTerms:
    """A metric of a known name that combines in another way."""
    return LossTerms(-scored.logprobs)


@loss()
def wrong_shape(scored: Scored) -> LossTerms:
    """Gives one term too few."""
    return LossTerms(-scored.logprobs[1:])


def plain(scored: Scored) -> LossTerms:
    """A function without a card."""
    return LossTerms(-scored.logprobs)
