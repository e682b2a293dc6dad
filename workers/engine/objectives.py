"""What a call minimises: a loss with its options, its reduction and what it compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensafe.wire.losses import TARGET_TOKENS, WEIGHTS, Reduction, Value
from workers.engine.adapters import Adapter
from workers.losses import Loss, LossRegistry, Statistic
from workers.operations import ArtifactWeights, LossRequest


@dataclass(frozen=True, slots=True)
class Objective:
    """A call's loss, everything resolved.

    Attributes:
        compares: whether it needs the reference's numbers.
        reference: the reference's adapter; None for the base model.
        statistics: what it reads of each position beside the targets' log-probabilities.
    """

    loss: Loss
    options: dict[str, Value]
    reduction: Reduction
    compares: bool
    reference: Adapter | None
    statistics: frozenset[Statistic]

    @property
    def measures_against_others(self) -> bool:
        """Whether its log-probabilities meet such as were computed elsewhere: by the sampler, by a
        forward pass, by the reference."""
        return self.compares or len(self.loss.card.inputs) > len((TARGET_TOKENS, WEIGHTS))


def resolve(
    request: LossRequest, losses: LossRegistry, adapter_of: Callable[[ArtifactWeights], Adapter]
) -> Objective:
    """Reads what a request says of its loss.

    Args:
        adapter_of: loads an artifact's adapter.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION or INVALID_ARGUMENT for what the loss lacks or refuses;
            what `adapter_of` raises.
    """
    loss = losses.find(request.loss)
    card = loss.card
    options = card.resolve_options(request.options, "loss.options")
    reduction = card.resolve_reduction(request.reduction, "loss.reduction")
    source = None if request.reference is None else request.reference.source
    compares = card.needs_reference(source, options, request.batch.tensors(), "loss.reference")
    adapter = None
    if compares and request.reference is not None and request.reference.artifact is not None:
        adapter = adapter_of(request.reference.artifact)
    return Objective(
        loss, options, reduction, compares, adapter, loss.statistics(options, compares)
    )
