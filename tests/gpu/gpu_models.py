"""Models on a GPU: tiny ones in float32, and one in bfloat16 that is large enough to mean it."""

from __future__ import annotations

import torch
from parity.tiny_runs import tiny_llama

from workers.engine.base_model import BaseModel, freeze

DEVICE = "cuda:0"
MIDDLE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}


def tiny(device: str = DEVICE) -> BaseModel:
    """Float32."""
    return freeze("tiny", tiny_llama().to(device))


def middle(dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> BaseModel:
    """Heads of 32."""
    return freeze("tiny", tiny_llama(**MIDDLE).to(device, dtype))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative, in L2."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
