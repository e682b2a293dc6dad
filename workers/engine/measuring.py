"""How many tokens a pass may have, measured on the device at hand."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from workers.engine.base_model import BaseModel
from workers.engine.batches import check_batch
from workers.engine.budget import TokenBudget
from workers.engine.computing import compute
from workers.engine.objectives import Objective
from workers.engine.passes import Call, cut
from workers.losses import Reduction
from workers.losses.cross_entropy import cross_entropy
from workers.operations import Batch, LoraSettings, LossRequest

_PROBE_TOKENS = 64
_SHARE_CPU, _SHARE_GPU = 1 / 2, 3 / 8
"""Of the free memory, for activations; the rest is for adapters, the head's chunks and others, on a
GPU for captured passes too."""
_MOST_CPU, _MOST_GPU = 1024, 65_536
"""Beyond these a pass gains nothing: the matrix products are as fast as they get. On a CPU it
loses: the activations of 4,088 tokens leave its caches, and a step takes 23 to 26 s instead of the
21 that passes of 1,022 tokens take."""
_LEAST = 256


def measure_budget(model: BaseModel) -> TokenBudget:
    """What fits into its share of the memory that is free now."""
    on_cpu = model.device == "cpu"
    most, share = (_MOST_CPU, _SHARE_CPU) if on_cpu else (_MOST_GPU, _SHARE_GPU)
    fits = int(share * free_bytes(model.device) / token_bytes(model))
    return TokenBudget(max(_LEAST, min(most, fits)))


def token_bytes(model: BaseModel) -> float:
    """`activation_bytes`, measured when first asked for."""
    if model.token_bytes is None:
        model.token_bytes = activation_bytes(model)
    return model.token_bytes


def activation_bytes(model: BaseModel) -> float:
    """Bytes per token that a training pass keeps for its backward pass."""
    import numpy as np

    length = min(_PROBE_TOKENS, model.context_length)
    tokens = (np.arange(length) % model.vocabulary_size).astype(np.int32)
    request = LossRequest(Batch(np.asarray([0, length]), tokens, tokens))
    options = cross_entropy.card.resolve_options({}, "")
    objective = Objective(cross_entropy, options, Reduction.TOKEN_MEAN, False, None, frozenset())
    batch = check_batch(
        request,
        objective.loss,
        objective.reduction,
        model.vocabulary_size,
        model.context_length,
    )
    names = tuple(sorted(model.linear_modules))
    adapter = model.new_adapter(LoraSettings(rank=8, dropout=0.0, target_modules=names))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    frozen = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(model, [Call(adapter, batch, objective)], cut([batch], length)[0], trains=True)
    return sum(size for place, size in kept.items() if place not in frozen) / length


def free_bytes(device: str) -> int:
    """Memory that new tensors may take: of the GPU, or of this process's container or machine."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, free)
