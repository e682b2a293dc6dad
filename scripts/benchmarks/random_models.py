"""Models built at random from public configurations: throughput does not depend on weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.engine.base_model import BaseModel, freeze
from workers.engine.choosing import choose_product

_CONFIGS: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B, as published: 1.24 B parameters.
    "random-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": True,
    },
    # SmolLM2-135M, for machines that cannot fetch it.
    "random-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # The same way in little, for tests.
    "random-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
NAMES = tuple(_CONFIGS)


def vocabulary(name: str) -> int:
    """How many tokens a model knows."""
    return int(_CONFIGS[name]["vocab_size"])


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """A `transformers` model where it is to be used; never twice on the way."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**_CONFIGS[name]))
    finally:
        torch.set_default_dtype(before)


def base_model(name: str, device: str, dtype: torch.dtype) -> BaseModel:
    """The engine's form of one, made ready as a worker does."""
    model = freeze(name, build(name, device, dtype))
    model.product = choose_product(model)
    return model
