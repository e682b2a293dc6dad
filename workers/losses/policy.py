"""What policy-gradient losses share: their inputs, a penalty and a bonus, and their metrics.

With r = exp(logprob − q), q the log-probability under the policy that sampled the token:

    loss = Σ term + kl_coef·KL(run ‖ reference) − entropy_coef·H(run)

KL and H are exact, over the whole vocabulary at each scored position, and computed only if their
coefficient is given; 0 only measures them. Entropy bonus: Mnih et al. 2016, arXiv 1602.01783.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensafe.wire.losses import (
    LossInput,
    LossMetric,
    LossOption,
    LossOutput,
    Number,
    ReferenceRule,
)
from workers.losses.declaration import Loss, LossFunction, loss
from workers.losses.scored import LossTerms, Scored, Statistic

if TYPE_CHECKING:
    from torch import Tensor

_INPUTS = (
    LossInput("logprobs", "of the targets, under the policy that sampled them"),
    LossInput("advantages", "how much better than expected each target was; may be negative"),
)
_ENTROPY_COEF = Number(
    "entropy_coef", "times the entropy is subtracted; not given: not computed", None, 0.0, 1e6
)
_KL_COEF = Number(
    "kl_coef", "times KL(run ‖ reference) is added; not given: not computed", None, 0.0, 1e6
)
_METRICS = (
    LossMetric("ratio_max", "max", "largest r"),
    LossMetric("ratio_min", "min", "smallest r"),
    LossMetric(
        "approx_kl",
        "mean",
        "KL(sampling policy ‖ run) over the scored tokens, estimated without bias as r minus 1 "
        "minus log r (Schulman 2020, k3)",
    ),
    LossMetric("entropy", "mean", "over the scored tokens, nats; with entropy_coef"),
    LossMetric("kl", "mean", "KL(run ‖ reference) over the scored tokens, nats; with kl_coef"),
)
_OUTPUTS = (
    LossOutput("entropy", "nats; with entropy_coef"),
    LossOutput("kl", "KL(run ‖ reference), nats; with kl_coef"),
)
CLIP_FRACTION = LossMetric("clip_fraction", "mean", "share of scored tokens that the clip changed")


def ratio_bound(name: str, default: float) -> Number:
    """A bound of r: the lower one at most 1, the upper one at least 1."""
    lower = name == "clip_low"
    what = "smallest" if lower else "largest"
    return Number(
        name, f"{what} r that counts", default, 0.0 if lower else 1.0, 1.0 if lower else 1e6
    )


def policy_loss(
    *,
    source: str,
    options: Sequence[LossOption] = (),
    metrics: Sequence[LossMetric] = (),
    outputs: Sequence[LossOutput] = (),
) -> Callable[[LossFunction], Loss]:
    """Makes a function of scored positions and its own options into a policy-gradient loss."""

    def make(function: LossFunction) -> Loss:
        @functools.wraps(function)
        def regularised(
            scored: Scored, entropy_coef: float | None, kl_coef: float | None, **own: Any
        ) -> LossTerms:
            found = function(scored, **own)
            terms = found.terms
            if scored.entropy is not None and entropy_coef:
                terms = terms - entropy_coef * scored.entropy
            if scored.kl is not None and kl_coef:
                terms = terms + kl_coef * scored.kl
            shared = _measures(scored)
            both = {
                name: values.detach()
                for name, values in (("entropy", scored.entropy), ("kl", scored.kl))
                if values is not None
            }
            return LossTerms(terms, {**shared, **both, **found.metrics}, {**both, **found.outputs})

        return loss(
            source=source,
            inputs=_INPUTS,
            options=[*options, _ENTROPY_COEF, _KL_COEF],
            metrics=[*metrics, *_METRICS],
            outputs=[*outputs, *_OUTPUTS],
            reference=ReferenceRule(with_option="kl_coef"),
            needs=_needs,
        )(regularised)

    return make


def log_ratio(scored: Scored) -> Tensor:
    """log r [S], differentiable."""
    return scored.logprobs - scored.inputs["logprobs"]


def _needs(options: Mapping[str, Any], reference: bool) -> list[Statistic]:
    needed = []
    if options["entropy_coef"] is not None:
        needed.append(Statistic.ENTROPY)
    if options["kl_coef"] is not None:
        needed.append(Statistic.KL)
    return needed


def _measures(scored: Scored) -> dict[str, Tensor]:
    logs = log_ratio(scored).detach()
    ratios = logs.exp()
    return {"ratio_max": ratios, "ratio_min": ratios, "approx_kl": ratios - 1 - logs}
