"""What a loss is computed from, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # cards of losses are read where there is no torch
    from torch import Tensor


class Statistic(Enum):
    """What can be had of each scored position's distribution, beside the targets' logprobs."""

    MEAN_LOGPROB = "mean_logprobs"
    ENTROPY = "entropy"
    REFERENCE_LOGPROB = "reference_logprobs"
    KL = "kl"
    FORWARD_KL = "forward_kl"


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored positions of whole datums, end to end: S positions of R datums, in order.

    Tensors are float32, or wider if the model is. With wide targets, what has one value for each
    target is [S, K].

    Attributes:
        logprobs: [S] or [S, K], log-probability of each target; differentiable.
        weights: [S] or [S, K], not 0 (a wide one: not 0 for some target).
        lengths: scored positions of each datum, at least 1.
        inputs: name → [S], or [S, K] for a wide one; those that the call has.
        mean_logprobs: [S], (1/V)·Σ_v log p_v over the vocabulary; differentiable.
        entropy: [S], −Σ_v p_v·log p_v; differentiable.
        reference_logprobs: [S] or [S, K], the targets' under the reference.
        kl: [S], KL(run ‖ reference); differentiable.
        forward_kl: [S], KL(reference ‖ run); differentiable.

    What the loss did not ask for is None.
    """

    logprobs: Tensor
    weights: Tensor
    lengths: Sequence[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    mean_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None
    kl: Tensor | None = None
    forward_kl: Tensor | None = None

    def datum_sums(self, values: Tensor) -> Tensor:
        """[S] → [R]. Each datum's own sum, whatever lies beside it."""
        import torch

        return torch.stack([part.sum() for part in torch.split(values, list(self.lengths))])

    def spread(self, values: Tensor) -> Tensor:
        """[R] → [S]: each datum's value at each of its positions."""
        import torch

        pairs = zip(values.unbind(), self.lengths, strict=True)
        return torch.cat([value.expand(length) for value, length in pairs])


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a loss function gives.

    Attributes:
        terms: [S] or [S, K], differentiable: what is weighted and summed. Of a loss `per` sequence
            [R / datums_together], weighted by itself.
        metrics: declared name → values of any number, which are combined as declared.
        outputs: declared name → [S], [S, K] or, per datum, [R].
    """

    terms: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
