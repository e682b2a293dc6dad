"""A frozen base model, ready to carry adapters."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.adapters import AdapterPool
from workers.engine.dropout import DropoutScope


class UnsupportedModelError(Exception):
    """A model that the engine would compute wrongly."""


@dataclass
class BaseModel:
    """One model, shared by every run on it.

    Attributes:
        name: its registered name.
        module: the causal language model, frozen, in eval mode.
        body: what gives hidden states.
        head: the linear layer from hidden states to logits.
        tokenizer: of `transformers`; None without one.
        linear_modules: last part of the name → count, without embeddings and the head.
        end_tokens: ids that end a completion.
        references: other names under which tenants may ask for it.
        tokenizer_files: name → content.
    """

    name: str
    module: Any
    body: nn.Module
    head: nn.Linear
    tokenizer: Any
    vocabulary_size: int
    context_length: int
    device: str
    linear_modules: Mapping[str, int]
    end_tokens: frozenset[int]
    references: tuple[str, ...] = ()
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scope = DropoutScope()
        self.adapters = AdapterPool(self.module, self.scope, self.device)
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return self.head.weight.dtype

    @property
    def parameters(self) -> int:
        """How many numbers the frozen weights are, tied ones once, adapters not."""
        return sum(p.numel() for name, p in self.module.named_parameters() if ".lora_" not in name)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states [R, T, D] of rows padded on the right.

        No attention mask: a causal model's position sees nothing to its right, and without a mask
        attention takes its fast path.
        """
        output = self.body(input_ids=input_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden


def freeze(
    name: str,
    module: Any,
    *,
    tokenizer: Any = None,
    references: tuple[str, ...] = (),
    tokenizer_files: Mapping[str, bytes] | None = None,
) -> BaseModel:
    """Makes a `transformers` causal language model into a base model, where it lies.

    Raises:
        UnsupportedModelError: if its logits are more than a linear map of its hidden states, or it
            states no context length.
    """
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    config = module.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        raise UnsupportedModelError(f"{name}: its configuration has no max_position_embeddings")
    head = module.get_output_embeddings()
    body = module.base_model
    if not isinstance(head, nn.Linear) or body is module:
        raise UnsupportedModelError(f"{name}: it has no plain linear output head")
    _check_head(name, module, body, head)
    return BaseModel(
        name=name,
        module=module,
        body=body,
        head=head,
        tokenizer=tokenizer,
        vocabulary_size=head.weight.shape[0],
        context_length=int(context),
        device=str(head.weight.device),
        linear_modules=_linear_modules(module, head),
        end_tokens=_end_tokens(module, tokenizer),
        references=references,
        tokenizer_files=tokenizer_files or {},
    )


@torch.no_grad()
def _check_head(name: str, module: Any, body: nn.Module, head: nn.Linear) -> None:
    """Some models cap or scale their logits, which the loss would miss."""
    ids = torch.arange(4, device=head.weight.device)[None]
    expected = module(input_ids=ids, use_cache=False).logits.float()
    actual = head(body(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(expected, actual, rtol=1e-2, atol=1e-3):
        raise UnsupportedModelError(f"{name}: its logits are not a linear map of its hidden states")


def _linear_modules(module: nn.Module, head: nn.Linear) -> dict[str, int]:
    names = (
        name.rsplit(".", 1)[-1]
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    )
    return dict(Counter(names))


def _end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    generation = getattr(module, "generation_config", None)
    for holder in (generation, module.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(found)
