"""Names that plain `peft` takes for something else than a model's linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
import torch
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn

from workers.engine.adapters import lay_out


def read_otherwise(module: Any, names: Iterable[str]) -> set[str]:
    """Those under which an adapter that was saved here would compute something else there.

    In models with experts `gate_proj` stands for the experts' joint weights, and not for the layers
    of this name that some of these models have beside them.
    """
    return {name for name in names if not _is_kept(module, name)}


def _is_kept(module: Any, name: str) -> bool:
    """Whether `peft` reads a configuration that targets it, and the tensors, as they are."""
    config = peft.LoraConfig(target_modules=[name])
    layers = {path: part for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    saved = {slot.key: torch.zeros(slot.shape) for slot in lay_out(layers, [name], rank=1)}
    try:
        convert_peft_config_for_transformers(config, module, None)
        read = convert_peft_adapter_state_dict_for_transformers(module, config, dict(saved))
    except ValueError:  # it wants others with it
        return False
    shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in (saved, read)]
    return name in (config.target_modules or ()) and shapes[0] == shapes[1]
