"""A tiny random Llama in float32, and batches in both forms: ours and Hugging Face's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.engine.engine import TorchBackend
from workers.operations import (
    Batch,
    LoraSettings,
    LossRequest,
    OptimizerSettings,
    Reduction,
    RunSettings,
)

VOCABULARY = 96
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def tiny_llama(**changes) -> LlamaForCausalLM:
    """The same weights at each call."""
    torch.manual_seed(11)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


def lora(**options) -> LoraSettings:
    return LoraSettings(
        **{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": TARGETS} | options
    )


def settings(
    *,
    seed: int = 5,
    accumulation_steps: int = 1,
    max_steps: int | None = None,
    deterministic: bool = False,
    **options,
) -> RunSettings:
    """Run settings; `lora` and `optimizer` take dictionaries."""
    optimizer = {"learning_rate": 1e-2} | options.get("optimizer", {})
    return RunSettings(
        "tiny",
        lora=lora(**options.get("lora", {})),
        optimizer=OptimizerSettings(**optimizer),
        accumulation_steps=accumulation_steps,
        max_steps=max_steps,
        seed=seed,
        deterministic=deterministic,
    )


def rows_of(seed: int, lengths: list[int]) -> list[np.ndarray]:
    """Random rows of token ids; one more token than positions, since targets are shifted."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, length + 1).astype(np.int32) for length in lengths]


Masked = int | Sequence[int]
"""How many targets are not scored at the beginning of all rows, or of each."""


def request_of(
    rows: list[np.ndarray],
    *,
    masked: Masked = 1,
    reduction: Reduction = Reduction.TOKEN_MEAN,
) -> LossRequest:
    """Our form of rows."""
    prompts = [masked] * len(rows) if isinstance(masked, int) else masked
    tokens = np.concatenate([row[:-1] for row in rows])
    targets = np.concatenate([row[1:] for row in rows])
    weights = np.concatenate(
        [
            (np.arange(len(row) - 1) >= prompt).astype(np.float32)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
    )
    offsets = np.cumsum([0, *(len(row) - 1 for row in rows)], dtype=np.int64)
    return LossRequest(Batch(offsets, tokens, targets, weights), reduction=reduction)


def hf_batch(rows: list[np.ndarray], *, masked: Masked = 1) -> dict[str, torch.Tensor]:
    """The same rows as a Hugging Face collator pads them; labels aligned with input_ids."""
    prompts = [masked] * len(rows) if isinstance(masked, int) else masked
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[index, : len(row)] = 1
        labels[index, prompt + 1 : len(row)] = ids[index, prompt + 1 : len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def metric(outcome, name: str) -> float:
    (found,) = [item.value for item in outcome.metrics if item.name == name]
    return found


def perturb(backend: TorchBackend, run_id: str, seed: int = 1) -> None:
    """B starts at zero, which would hide errors in A's gradient."""
    with torch.no_grad():
        weights = backend._runs[run_id].adapter.weights
        weights += 0.05 * torch.randn(
            weights.shape, generator=torch.Generator().manual_seed(seed), dtype=weights.dtype
        )
