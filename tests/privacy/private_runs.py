"""Private runs on a tiny model, and what they are held to: single examples in plain `peft`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_models import FAMILIES
from parity.tiny_runs import perturb, request_of, settings
from torch import Tensor

from tensafe.wire.losses import Reduction
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.operations import LossRequest, PrivacySettings, RunSettings

MARGIN = 1e-6
"""What clipped gradients stay below C, relative to it."""


SGD = {
    "name": "sgd",
    "beta1": None,
    "beta2": None,
    "eps": None,
    "learning_rate": 1.0,
    "weight_decay": 0.0,
}
"""Moves the weights by what a step releases."""


def privacy(**changes) -> PrivacySettings:
    """Without noise, unless asked for."""
    fields = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 8.0}
    return PrivacySettings(**fields | changes)


def private(run: RunSettings, **changes) -> RunSettings:
    """The same run, private."""
    return replace(run, privacy=privacy(**changes))


def private_request(rows: list[np.ndarray], units: Sequence[int] | None = None, **options):
    """A batch in which each example counts by its own token mean."""
    request: LossRequest = request_of(rows, reduction=options.pop("reduction", None), **options)
    if units is not None:
        request.batch.units = np.asarray(units, np.int32)
    return request


def exact_model(name: str = "llama-gqa", context: int = 64) -> BaseModel:
    """In float64."""
    return freeze("tiny", FAMILIES[name].build(max_position_embeddings=context))


def open_private(
    backend: TorchBackend, run_id: str = "run", *, lora=None, seed: int = 5, **changes
):
    """A private run whose B is not zero."""
    options = settings(seed=seed, lora=lora or {})
    backend.open_run(run_id, private(options, **changes), None)
    perturb(backend, run_id, seed)


def example_gradients(
    plain: PlainPeft, rows: list[np.ndarray], masked: int | Sequence[int], summed: bool = False
) -> list[dict[str, Tensor]]:
    """Of each example alone, in a batch of one: of its own token mean, or token sum."""
    prompts = [masked] * len(rows) if isinstance(masked, int) else masked
    found = []
    for row, prompt in zip(rows, prompts, strict=True):
        for parameter in plain.parameters():
            parameter.grad = None
        scored = len(row) - 1 - prompt
        if scored > 0:
            loss = plain.loss([row], prompt)
            (loss * scored if summed else loss).backward()
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in plain.named().items()
            }
        )
    return found


def clipped_sum(
    gradients: Sequence[dict[str, Tensor]], units: Sequence[int], bound: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Σ over units of their gradient, clipped by its norm over all tensors; and those norms."""
    by_unit: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
    for unit, gradient in zip(units, gradients, strict=True):
        if unit >= 0:
            by_unit[unit].append(gradient)
    total = {name: torch.zeros_like(tensor) for name, tensor in gradients[0].items()}
    norms = []
    for own in by_unit.values():
        summed = {name: sum(gradient[name] for gradient in own) for name in total}
        norm = torch.sqrt(sum(tensor.square().sum() for tensor in summed.values())).item()
        factor = min(1.0, bound * (1 - MARGIN) / norm) if norm else 1.0
        for name in total:
            total[name] += factor * summed[name]
        norms.append(norm)
    return total, norms


def unit_sum(backend: TorchBackend, run_id: str = "run") -> Tensor:
    """[P]: what the window has accumulated."""
    return backend._runs[run_id].accumulator


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of any tensor, relative to that tensor's norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


SEQUENCE_MEAN, TOKEN_SUM = Reduction.SEQUENCE_MEAN, Reduction.SUM
