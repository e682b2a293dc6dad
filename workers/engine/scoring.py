"""The losses of one pass: from its scored positions' hidden states to each call's sum and metrics.

Calls that ask for the same statistics share one sweep over the head; each loss then sees the
positions of its own call alone.
"""

# ruff: noqa: N803, N806, N815 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.batches import ScoredBatch
from workers.engine.memory import is_memory_error
from workers.engine.objectives import Objective
from workers.engine.statistics import Statistics, measure
from workers.engine.uploads import upload
from workers.losses import LossTerms, Scored
from workers.operations import Int64


@dataclass(frozen=True, slots=True)
class Portion:
    """What a pass has of one call.

    Attributes:
        call: its index.
        rows: of its batch, in the order of the pass.
        sources: int64 [s], where its scored positions lie in its batch.
        counts: scored positions of each row.
        places: where they lie among the pass's.
        reference_SD: hidden states of the reference at them, if the objective compares.
        apart: whether each row's own loss is asked for.
    """

    call: int
    objective: Objective
    batch: ScoredBatch
    rows: list[int]
    sources: Int64
    counts: list[int]
    places: slice
    reference_SD: Tensor | None
    apart: bool = False


@dataclass(frozen=True, slots=True)
class PortionLoss:
    """What came of a portion.

    Attributes:
        loss: scalar, without graph; the sum of its weighted terms, each times its datum's share.
        metrics: name → the values' sum, smallest or largest, as declared, and how many they were.
        outputs: name → [s], [s, K] or, per datum, [rows].
        row_losses: [rows], whose sum is the loss; None if not asked for.
        slopes: statistics that the loss was computed from, with graph, and its gradient by each.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, int]]
    outputs: dict[str, Tensor]
    row_losses: Tensor | None = None
    slopes: Sequence[tuple[Tensor, Tensor]] = ()

    def detached(self) -> PortionLoss:
        """The same without graph."""
        return replace(self, slopes=())


class LossFunctionError(Exception):
    """A loss function failed.

    Attributes:
        call: whose.
    """

    def __init__(self, call: int, name: str) -> None:
        super().__init__(f"the loss {name} failed")
        self.call = call


def score(
    head: torch.nn.Linear, hidden_SD: Tensor, portions: Sequence[Portion]
) -> list[PortionLoss]:
    """Each portion's loss, and what `backward` wants of it.

    Raises:
        LossFunctionError: a loss function failed.
    """
    tensors = _upload(portions, hidden_SD)
    found: dict[int, PortionLoss] = {}
    for members in _alike(portions).values():
        own = [portions[index] for index in members]
        statistics = _measure(head, hidden_SD, own, [tensors[index] for index in members])
        for index, measured in zip(members, statistics, strict=True):
            found[index] = _evaluate(portions[index], tensors[index], measured)
    return [found[index] for index in range(len(portions))]


def backward(found: Sequence[PortionLoss]) -> None:
    """One backward pass of all of them: d Σ losses, from their statistics on."""
    slopes = [slope for each in found for slope in each.slopes]
    torch.autograd.backward([values for values, _ in slopes], [slope for _, slope in slopes])


@dataclass(frozen=True, slots=True)
class _Tensors:
    """A portion's tensors on the device: targets, weights and inputs, and shares [s, 1] or [s]."""

    targets: Tensor
    weights: Tensor
    inputs: dict[str, Tensor]
    shares: Tensor | None


def _upload(portions: Sequence[Portion], like: Tensor) -> list[_Tensors]:
    """Two transfers, whatever the number of portions: one of integers, one of floats."""
    wide = torch.promote_types(like.dtype, torch.float32)
    stacks = {"i": _Stack(np.dtype(np.int64)), "f": _Stack(np.dtype(str(wide).split(".")[1]))}
    keys = []
    for portion in portions:
        batch, sources = portion.batch, portion.sources
        named = {"targets": batch.targets, "weights": batch.weights}
        named |= {f"input {name}": values for name, values in batch.inputs.items()}
        own: dict[str, np.ndarray[Any, Any]] = {
            name: values[sources] for name, values in named.items()
        }
        if batch.shares is not None:
            each = np.repeat(batch.shares[portion.rows], portion.counts)
            own["shares"] = each[:, None] if own["weights"].ndim > 1 else each
        keys.append({name: stacks[a.dtype.kind].put(a) for name, a in own.items()})
    uploaded = {kind: stack.upload(like.device) for kind, stack in stacks.items()}
    return [_unpack(portion, key, uploaded) for portion, key in zip(portions, keys, strict=True)]


_Key = tuple[str, slice, tuple[int, ...]]


class _Stack:
    """Arrays of one kind, end to end."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._size = 0

    def put(self, array: np.ndarray[Any, Any]) -> _Key:
        begin = self._size
        self._size += array.size
        self._arrays.append(array.ravel())
        return array.dtype.kind, slice(begin, self._size), array.shape

    def upload(self, device: torch.device) -> Tensor:
        joined = np.concatenate(self._arrays or [np.zeros(0)]).astype(self._dtype)
        return upload(joined, device)


def _unpack(portion: Portion, keys: dict[str, _Key], uploaded: dict[str, Tensor]) -> _Tensors:
    found = {name: uploaded[kind][part].view(shape) for name, (kind, part, shape) in keys.items()}
    inputs = {name: found[f"input {name}"] for name in portion.batch.inputs}
    return _Tensors(found["targets"], found["weights"], inputs, found.get("shares"))


def _alike(portions: Sequence[Portion]) -> dict[Any, list[int]]:
    """Portions by what they ask of the head: statistics, and targets for each position."""
    groups: dict[Any, list[int]] = {}
    for index, portion in enumerate(portions):
        width = portion.batch.targets.shape[1:]
        key = (portion.objective.statistics, portion.objective.compares, width)
        groups.setdefault(key, []).append(index)
    return groups


def _measure(
    head: torch.nn.Linear,
    hidden_SD: Tensor,
    portions: Sequence[Portion],
    tensors: Sequence[_Tensors],
) -> list[Statistics]:
    sizes = [len(portion.sources) for portion in portions]
    if sum(sizes) < len(hidden_SD):
        hidden_SD = torch.cat([hidden_SD[portion.places] for portion in portions])
    references = [p.reference_SD for p in portions if p.reference_SD is not None]
    whole = measure(
        head,
        hidden_SD,
        torch.cat([own.targets for own in tensors]),
        portions[0].objective.statistics,
        torch.cat(references) if references else None,
    )
    return whole.split(sizes)


def _evaluate(portion: Portion, tensors: _Tensors, statistics: Statistics) -> PortionLoss:
    """Whatever the loss function does wrong, in its backward pass or in what it returns too, is
    found here and its own call's: behind this all calls go on together."""
    try:
        return _evaluated(portion, tensors, statistics)
    except Exception as error:
        if is_memory_error(error):
            raise
        raise LossFunctionError(portion.call, portion.objective.loss.name) from error


def _evaluated(portion: Portion, tensors: _Tensors, statistics: Statistics) -> PortionLoss:
    objective = portion.objective
    measured = statistics.named()
    leaves = {
        name: values.detach().requires_grad_()
        for name, values in measured.items()
        if values.requires_grad
    }
    scored = Scored(
        weights=tensors.weights,
        lengths=portion.counts,
        inputs=tensors.inputs,
        **(measured | leaves),
    )
    found = objective.loss(scored, **objective.options)
    terms = found.terms
    if objective.loss.per == "token":
        terms = tensors.weights * terms
    if tensors.shares is not None:
        terms = terms * tensors.shares
    loss = terms.sum()
    slopes = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True) if leaves else ()
    logprobs = statistics.logprobs.detach()
    if logprobs.ndim > 1:
        logprobs = logprobs.where(tensors.weights != 0, 0)
    outputs = {"logprobs": logprobs}
    outputs |= {name: values.detach().to(logprobs) for name, values in found.outputs.items()}
    return PortionLoss(
        loss.detach(),
        _metrics(objective, found, logprobs.dtype),
        outputs,
        scored.datum_sums(terms.detach()) if portion.apart else None,
        [
            (measured[name], slope)
            for name, slope in zip(leaves, slopes, strict=True)
            if slope is not None
        ],
    )


def _metrics(
    objective: Objective, found: LossTerms, dtype: torch.dtype
) -> dict[str, tuple[Tensor, int]]:
    metrics = {}
    for metric in objective.loss.card.metrics:
        values = found.metrics.get(metric.name)
        if values is not None and values.numel():
            metrics[metric.name] = (
                _combined(values.detach().to(dtype), metric.combine),
                values.numel(),
            )
    return metrics


def _combined(values: Tensor, how: str) -> Tensor:
    if how == "min":
        return values.amin()
    return values.amax() if how == "max" else values.sum()
