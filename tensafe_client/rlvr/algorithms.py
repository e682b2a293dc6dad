"""The algorithms: how rewards become advantages, and which loss learns from them.

None has a critic: the other completions of a problem, or of the batch, are the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """What tells one from another.

    Attributes:
        source: the paper.
        baseline: what a reward is compared with by default: "group_mean" (its problem's rewards),
            "group_others" (those without itself), "batch_mean", "moving_average" or "none".
        baselines: which it may have.
        scale: what advantages are divided by, by default: the standard deviation of the "group" or
            the "batch", or "none".
        loss: the service's loss. `importance_sampling` is −Σ r·A, whose gradient is the policy
            gradient; `ppo` clips r.
        clips: whether the loss has bounds of the ratio.
    """

    source: str
    baseline: str
    scale: str
    loss: str
    baselines: tuple[str, ...] = ()
    clips: bool = False

    @property
    def compares_in_groups(self) -> bool:
        """Whether a problem with one completion teaches nothing."""
        return self.baseline.startswith("group")


_OF_BATCHES = ("batch_mean", "moving_average", "none")

ALGORITHMS: Mapping[str, Algorithm] = {
    "reinforce": Algorithm(
        source="Williams 1992, Machine Learning 8, 229-256",
        baseline="batch_mean",
        baselines=_OF_BATCHES,
        scale="none",
        loss="importance_sampling",
    ),
    "rloo": Algorithm(
        source="Ahmadian et al. 2024, arXiv 2402.14740, section 3",
        baseline="group_others",
        scale="none",
        loss="importance_sampling",
    ),
    "grpo": Algorithm(
        source="Shao et al. 2024, arXiv 2402.03300, section 4.1",
        baseline="group_mean",
        scale="group",
        loss="ppo",
        clips=True,
    ),
    "ppo": Algorithm(
        source="Schulman et al. 2017, arXiv 1707.06347, eq. 7, without a critic",
        baseline="batch_mean",
        baselines=_OF_BATCHES,
        scale="batch",
        loss="ppo",
        clips=True,
    ),
}
