"""Descriptions of the losses that runs may use."""

from __future__ import annotations

from dataclasses import dataclass

from tensafe.v1 import models_pb2
from tensafe.wire.loss_messages import card_of
from tensafe.wire.losses import LossInput, LossMetric, LossOption, LossOutput, ReferenceRule


@dataclass(frozen=True)
class LossInfo:
    """A loss: built in, or the operator's plug-in.

    Attributes:
        name: what `loss_fn` calls it.
        description: its formula.
        source: where the formula comes from.
        inputs: tensors of a datum that it takes.
        options: what `loss_config` may have.
        reductions: the default first.
        metrics: what it adds to a result's `metrics`.
        outputs: what it adds to a result's `outputs`.
        datums_together: how many datums after one another belong together; 2 for pairs.
        reference: when it compares with a reference; None: never.
        plug_in: whether the operator has plugged it in.
        models: names of the models that offer it in this form.
    """

    name: str
    description: str
    source: str
    inputs: tuple[LossInput, ...]
    options: tuple[LossOption, ...]
    reductions: tuple[str, ...]
    metrics: tuple[LossMetric, ...]
    outputs: tuple[LossOutput, ...]
    datums_together: int
    reference: ReferenceRule | None
    plug_in: bool
    models: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: models_pb2.OfferedLoss) -> LossInfo:
        """Unpacks a loss."""
        card = card_of(message.loss)
        return cls(
            name=card.name,
            description=card.description,
            source=card.source,
            inputs=card.inputs,
            options=card.options,
            reductions=tuple(str(name) for name in card.reductions),
            metrics=card.metrics,
            outputs=card.outputs,
            datums_together=card.datums_together,
            reference=card.reference,
            plug_in=card.plug_in,
            models=tuple(message.models),
        )
