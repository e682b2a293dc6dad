"""Direct preference optimisation."""

from __future__ import annotations

from tensafe.wire.losses import LossInput, LossMetric, LossOutput, Number, ReferenceRule
from workers.losses.declaration import loss
from workers.losses.scored import LossTerms, Scored, Statistic


@loss(
    source="Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023, "
    "conservative DPO, equation 3",
    inputs=[
        LossInput(
            "reference_logprobs",
            "of the targets, under the reference; not given: computed, from the base model or "
            "from the artifact that the call names",
            required=False,
        )
    ],
    options=[
        Number("beta", "how closely the run is held to the reference", 0.1, 1e-6, 1e6),
        Number("label_smoothing", "share of pairs that are taken for swapped", 0.0, 0.0, 0.5),
    ],
    metrics=[
        LossMetric("margin", "mean", "Δ over the pairs"),
        LossMetric("accuracy", "mean", "share of pairs with Δ above 0"),
        LossMetric("chosen_reward", "mean", "reward of the chosen datums"),
        LossMetric("rejected_reward", "mean", "reward of the rejected datums"),
    ],
    outputs=[LossOutput("reward", "see the formula", per_datum=True)],
    per="sequence",
    datums_together=2,
    reference=ReferenceRule(unless_input="reference_logprobs", may_be_none=True),
    needs=lambda _, reference: [Statistic.REFERENCE_LOGPROB] if reference else [],
)
def dpo(scored: Scored, beta: float, label_smoothing: float) -> LossTerms:
    """−Σ ((1 − ε)·log σ(Δ) + ε·log σ(−Δ)) over pairs of datums, the chosen one before the rejected
    one; Δ = reward(chosen) − reward(rejected), reward = beta·Σ w·(logprob − reference).

    ε is `label_smoothing`. Terms [R / 2]. With the reference `none`, its logprobs count as 0.
    """
    from torch.nn.functional import logsigmoid

    reference = scored.inputs.get("reference_logprobs", scored.reference_logprobs)
    gains = scored.logprobs if reference is None else scored.logprobs - reference
    rewards = beta * scored.datum_sums(scored.weights * gains)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = chosen - rejected
    terms = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return LossTerms(
        terms,
        {
            "margin": margins.detach(),
            "accuracy": (margins > 0).detach(),
            "chosen_reward": chosen.detach(),
            "rejected_reward": rejected.detach(),
        },
        {"reward": rewards.detach()},
    )
