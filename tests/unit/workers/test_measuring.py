"""The token budget follows from what a token takes and from the memory that is free."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.engine import measuring
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.engine.measuring import measure_budget, token_bytes


def model(layers: int) -> BaseModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return freeze("tiny", LlamaForCausalLM(config))


def test_more_layers_take_more_of_each_token():
    two, six = token_bytes(model(2)), token_bytes(model(6))
    assert 1.9 < (six - two) / two < 2.1
    # In float32: a norm's and a product's inputs, q, k, v and the probabilities, the gates, and
    # what an adapter of rank 8 keeps of seven products.
    kept = 3 * 32 + 3 * 32 + 4 * 64 + 3 * 48 + 7 * 8
    assert 0.8 < two / (2 * 4 * kept) < 1.4


@pytest.mark.parametrize(("tokens", "budget"), [(10, 256), (400, 400), (900, 900), (5000, 1024)])
def test_half_of_the_free_memory_is_for_activations(monkeypatch, tokens, budget):
    base = model(2)
    free = int(2 * tokens * token_bytes(base)) + 1
    monkeypatch.setattr(measuring, "free_bytes", lambda _: free)
    assert measure_budget(base).tokens == budget
    assert TorchBackend([base], run_bytes=1, sample_bytes=1)._budgets["tiny"].tokens == budget
