"""A linear function of log-probabilities: the backward pass of a loss that a client computed."""

from __future__ import annotations

from tensafe.wire.losses import LossInput, Number, Reduction
from workers.losses.declaration import loss
from workers.losses.scored import LossTerms, Scored


@loss(
    source="the chain rule: what forward_backward_custom of the SDK sends",
    inputs=[LossInput("gradients", "∂ loss / ∂ logprob, at each target", wide=True)],
    options=[
        Number(
            "value",
            "what each target of a weight other than 0 adds to the reported loss, in place of "
            "gradient·logprob: so that the loss is the caller's own",
            None,
            -1e30,
            1e30,
        )
    ],
    reductions=[Reduction.SUM],
    wide=True,
)
def linear(scored: Scored, value: float | None) -> LossTerms:
    """Σ w·g·logprob, with g the gradients that come with the call.

    Terms [S] or [S, K].
    """
    products = scored.inputs["gradients"] * scored.logprobs
    return LossTerms(products if value is None else products - products.detach() + value)
