"""Tiny random models of the families that the engine is held to, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

VOCABULARY = 96
CONTEXT = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PLAIN = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
TURNED = ("c_attn", "c_proj", "c_fc")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """One configuration of a model.

    Attributes:
        model: the class's name, without `ForCausalLM` or `Model`.
        config: the class's name, without `Config`.
        norms: RMS norms in it, which the engine replaces by its own.
        linear: names of all its linear layers but the head.
    """

    model: str
    config: str
    options: dict[str, Any]
    norms: int
    linear: tuple[str, ...] = GATED

    def build(self, **changes: Any) -> Any:
        """The same weights at each call; in float64 and eval mode."""
        make = getattr(transformers, f"{self.config}Config")
        config = make(**_SIZES | self.options | changes)
        torch.manual_seed(11)
        plain = self.model.endswith("Head")
        module = getattr(transformers, self.model + ("Model" if plain else "ForCausalLM"))(
            config
        ).eval()
        generator = torch.Generator().manual_seed(12)
        with torch.no_grad():
            for parameter in module.parameters():
                # Biases begin at 0 and norms at 0 or 1, which would hide one that is left out.
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return module.double()


def _gemma3(layers: list[str]) -> dict[str, Any]:
    return {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "sliding_window": 7,
        "layer_types": layers,
        "query_pre_attn_scalar": 10,
    }


_LATENT_SIZES = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

FAMILIES = {
    "llama-gqa": Family("Llama", "Llama", {"num_key_value_heads": 2}, 5),
    "llama-mha-biases-tied": Family(
        "Llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10},
        5,
    ),
    "qwen2-untied": Family("Qwen2", "Qwen2", {"num_key_value_heads": 1}, 5),
    "qwen2-tied-windows": Family(
        "Qwen2",
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        5,
    ),
    "qwen3-tied": Family(
        "Qwen3",
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
        9,
    ),
    "qwen3-mha-biases": Family(
        "Qwen3", "Qwen3", {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}, 9
    ),
    "gemma": Family("Gemma", "Gemma", {"num_key_value_heads": 1, "head_dim": 12}, 5),
    "gemma3-windows": Family(
        "Gemma3", "Gemma3Text", _gemma3(["sliding_attention", "full_attention"]), 13
    ),
    "gemma3-untied-gqa": Family(
        "Gemma3",
        "Gemma3Text",
        _gemma3(["full_attention", "sliding_attention"])
        | {"num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": True},
        13,
    ),
    # Fused layers; positions beyond 32 would be turned in another way, for the whole pass.
    "phi3-longrope": Family(
        "Phi3",
        "Phi3",
        {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.0, 1.5, 2.0],
                "long_factor": [1.0, 3.0, 6.0, 9.0],
                "original_max_position_embeddings": 32,
                "factor": 2.0,
            },
        },
        5,
        FUSED,
    ),
    # Biases everywhere, the head's too; layer norms; heads turned in part.
    "phi": Family("Phi", "Phi", {"num_key_value_heads": 2}, 0, PLAIN),
    "mistral-windows": Family(
        "Mistral", "Mistral", {"num_key_value_heads": 2, "sliding_window": 5}, 5
    ),
    # Weights the other way round, learned positions, one layer for queries, keys and values.
    "gpt2": Family("GPT2LMHead", "GPT2", {"n_inner": 48}, 0, TURNED),
    # Keys of 12 numbers and values of 8, both from what few numbers tell of a token.
    "deepseek-latent": Family(
        "DeepseekV3",
        "DeepseekV3",
        _LATENT_SIZES | {"first_k_dense_replace": 2},
        9,
        LATENT,
    ),
    # Logits divided by 3, and multiplied by 0.3.
    "granite-scaled": Family(
        "Granite",
        "Granite",
        {
            "num_key_value_heads": 2,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
        5,
    ),
    "cohere-scaled": Family("Cohere", "Cohere", {"num_key_value_heads": 2, "logit_scale": 0.3}, 0),
}


SCALED_AHEAD = Family(
    "MiniCPM3",
    "MiniCPM3",
    _LATENT_SIZES | {"dim_model_base": 8},
    9,
    LATENT,
)
"""Its hidden states are divided by 4 ahead of the head."""
UNCAPPED = Family(
    "Gemma2",
    "Gemma2",
    _gemma3(["sliding_attention", "full_attention"])
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    9,
)
"""Its own attention is the eager one."""


class Wide(TorchFunctionMode):
    """Where `transformers` goes through float32, goes through float64.

    Its losses, norms, rotary embeddings and eager softmax do, whatever the model's type. The
    engine's own casts are left as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        # Some of torch's functions are Python, and come here from within.
        while frame.f_globals.get("__name__", "").startswith("torch.") and frame.f_back:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("transformers."):
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {
                name: torch.float64 if value is torch.float32 else value
                for name, value in kwargs.items()
            }
        return func(*args, **kwargs)
