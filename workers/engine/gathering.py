"""Puts together what the passes gave: each call's sum, metrics and outputs, from every portion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.engine.passes import Call, Pass, Share
from workers.engine.scoring import PortionLoss
from workers.operations import Combine, Float32, Metric, Output
from workers.window import combine

_COMBINES = {
    "sum": Combine.SUM,
    "mean": Combine.MEAN,
    "min": Combine.MIN,
    "max": Combine.MAX,
}


@dataclass(slots=True)
class Computed:
    """What came of one call; its gradient waits in its adapter, to be released.

    Attributes:
        loss_sum: of its terms, before it is divided.
        grad_norm: of the summed gradient; 0 if nothing was trained.
        metrics: that its loss defines.
        outputs: in the order of its batch; float32, or wider if the model is.
    """

    loss_sum: float
    grad_norm: float
    metrics: list[Metric]
    outputs: dict[str, Output]


def gather(
    calls: Sequence[Call],
    passes: Sequence[tuple[Pass, Sequence[PortionLoss]]],
    norms: Sequence[Tensor],
) -> list[Computed]:
    """What came of each call.

    Args:
        passes: and of each what came of its shares.
        norms: each call's gradient's; empty if nothing was trained.
    """
    found = [
        (share, portion)
        for work, own in passes
        for share, portion in zip(work.shares, own, strict=True)
    ]
    scalars = [*norms]
    for _, portion in found:
        scalars += [portion.loss, *(value for value, _ in portion.metrics.values())]
    # One transfer from the device for all numbers, and one for all outputs.
    numbers = torch.stack([scalar.double() for scalar in scalars]).tolist()
    flat = torch.cat([values.flatten() for _, p in found for values in p.outputs.values()])
    gathered = [_Gathered(call) for call in calls]
    at, outputs = len(norms), flat.cpu().numpy()
    begin = 0
    for share, portion in found:
        own = gathered[share.call]
        own.sums.append(numbers[at])
        ends = at + 1 + len(portion.metrics)
        own.add_metrics(portion, numbers[at + 1 : ends])
        at = ends
        for name, values in portion.outputs.items():
            part = outputs[begin : begin + values.numel()].reshape(values.shape)
            own.add_output(name, share, part)
            begin += values.numel()
    grad_norms = numbers[: len(norms)] or [0.0] * len(calls)
    return [own.computed(norm) for own, norm in zip(gathered, grad_norms, strict=True)]


class _Gathered:
    """One call's parts so far."""

    def __init__(self, call: Call) -> None:
        self._batch = call.batch
        card = call.objective.loss.card
        self._combines = {metric.name: _COMBINES[metric.combine] for metric in card.metrics}
        self._per_datum = {output.name for output in card.outputs if output.per_datum}
        self.sums: list[float] = []
        self._metrics: list[Metric] = []
        self._outputs: dict[str, Float32] = {}

    def add_metrics(self, portion: PortionLoss, values: Sequence[float]) -> None:
        """Values as they are combined: of a mean, the sum."""
        for (name, (_, count)), value in zip(portion.metrics.items(), values, strict=True):
            how = self._combines[name]
            mean = how is Combine.MEAN
            self._metrics.append(
                Metric(name, value / count if mean else value, how, count if mean else 0.0)
            )

    def add_output(self, name: str, share: Share, values: Float32) -> None:
        per_datum = name in self._per_datum
        size = len(self._batch.offsets) - 1 if per_datum else len(self._batch.tokens)
        if name not in self._outputs:
            self._outputs[name] = np.zeros((size, *values.shape[1:]), values.dtype)
        self._outputs[name][share.rows if per_datum else share.sources] = values

    def computed(self, grad_norm: float) -> Computed:
        return Computed(
            loss_sum=float(np.sum(self.sums, dtype=np.float64)),
            grad_norm=grad_norm,
            metrics=combine(self._metrics),
            outputs={
                name: Output(values, name in self._per_datum)
                for name, values in self._outputs.items()
            },
        )
