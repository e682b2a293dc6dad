"""A frozen base model, ready to carry adapters."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.engine import attention
from workers.engine.adapters import Adapter, new_adapter
from workers.engine.blocks import Blocks
from workers.engine.checks import (
    UnsupportedModelError,
    check_attention,
    check_decoding,
    check_head,
    check_packing,
    context_length,
    refusing,
    see_layers,
)
from workers.engine.dividing import dividing
from workers.engine.gated import lean_gates
from workers.engine.kernels import in_use as compiled_in_use
from workers.engine.lora import LoraLinear, LoraScope, LoraScopes, PassAdapters
from workers.engine.norms import lean_norms
from workers.engine.peft_names import read_otherwise
from workers.engine.products import Product, SegmentLoop
from workers.engine.sampling.cache import LayerShape
from workers.engine.widening import widened
from workers.operations import LoraSettings

if TYPE_CHECKING:
    from workers.engine.graphs.graphs import Graphs

attention.register()

_LONG_SEGMENT = 128
"""Tokens from which an adapter's products are faster in bfloat16 on a CPU. One of 63 takes 0.17 ms
forward and backward either way, of 254 0.33 against 0.54, of 15 0.13 against 0.06."""

_LINEAR = 0.9
"""Share of the frozen weights from which on linear layers are what a short pass waits for."""


@dataclass
class BaseModel:
    """One model, shared by every run on it.

    Attributes:
        name: its registered name.
        module: the causal language model, frozen, in eval mode.
        body: what gives hidden states.
        head: the linear layer from hidden states to logits.
        tokenizer: of `transformers`; None without one.
        linear_modules: last part of the name → count; what adapters may go on.
        end_tokens: ids that end a completion.
        token_bytes: that a training pass keeps for each token, once it was measured.
        references: other names under which tenants may ask for it.
        tokenizer_files: name → content.
        layer_shapes: what each layer's attention keeps of a token.
        logit_scale: what hidden states are multiplied by ahead of the head.
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
    layer_shapes: tuple[LayerShape, ...] = ()
    logit_scale: float = 1.0
    token_bytes: float | None = None

    def __post_init__(self) -> None:
        self.scope = LoraScopes() if self.device == "cpu" else LoraScope()
        self.product: Product = SegmentLoop()
        self.graphs: Graphs | None = None
        self.blocks = Blocks(self.body)
        self._longest_token = _longest_token(self.tokenizer)
        self.layers = _carry_adapters(self.module, self.head, self.scope)
        self._is_linear = _share_of_linear(self) > _LINEAR
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def longest_text(self) -> int:
        """Characters of a text beyond which it cannot fit into the context."""
        return self.context_length * self._longest_token

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return self.head.weight.dtype

    @property
    def parameters(self) -> int:
        """How many numbers the frozen weights are, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def new_adapter(self, settings: LoraSettings) -> Adapter:
        """An adapter for this model, all zero, in float32 or the model's wider type."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return new_adapter(settings, self.layers, self.device, dtype)

    def adapter_dtype(self, shortest: int) -> torch.dtype:
        """What the adapters of a pass compute in: the model's type, but on a CPU float32 at least
        if a segment is short, since small products in bfloat16 cost many times theirs there.

        Args:
            shortest: tokens of the shortest segment.
        """
        if self.device == "cpu" and shortest < _LONG_SEGMENT:
            return torch.promote_types(self.dtype, torch.float32)
        return self.dtype

    @property
    def faithful_adapter_dtype(self) -> torch.dtype:
        """What they compute in where no number may depend on a pass's size: while sampling, and
        wherever log-probabilities are compared with those of samples."""
        return self.adapter_dtype(1)

    def dividing(self, tokens: int) -> AbstractContextManager[None]:
        """Passes inside choose the CPU threads of each operation.

        Args:
            tokens: that an operation goes over.
        """
        # Other products than linear layers' do not choose for themselves, and compiled kernels
        # would run as written.
        chooses = self._is_linear and not compiled_in_use()
        return dividing(tokens * self.head.in_features if chooses else sys.maxsize, self.device)

    @contextmanager
    def carrying(self, adapters: PassAdapters | None) -> Iterator[None]:
        """Passes inside go through these adapters, their backward passes too."""
        self.scope.adapters = adapters
        try:
            yield
        finally:
            self.scope.adapters = None

    def hidden(
        self,
        ids_N: Tensor,  # noqa: N803 - the suffixes give shapes
        positions_N: Tensor,  # noqa: N803
        packing: attention.Layout,
        *,
        frugal: bool = False,
    ) -> Tensor:
        """Hidden states [N, D], as the head takes them, of tokens that belong together as their
        layout says.

        Args:
            frugal: keep only the layers' inputs for the backward pass, and compute them again.
        """
        self.blocks.frugal = frugal
        output = self.body(
            input_ids=ids_N[None],
            position_ids=positions_N[None],
            # A mask of four dimensions is handed on as it is; ours is in the packing.
            attention_mask=ids_N.new_ones(1, 1, 1, 1, dtype=torch.bool),
            use_cache=False,
            packing=packing,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden if self.logit_scale == 1 else hidden * self.logit_scale


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
        UnsupportedModelError: the engine would compute it wrongly, or not at all; saying why.
    """
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    context = context_length(module.config.get_text_config())
    if not context:
        raise UnsupportedModelError(f"{name}: its configuration has no max_position_embeddings")
    head = module.get_output_embeddings()
    body = module.base_model
    if not isinstance(head, nn.Linear) or body is module:
        raise UnsupportedModelError(f"{name}: it has no plain linear output head")
    with refusing(name):
        check_attention(name, module.config.get_text_config())
        logit_scale = check_head(name, module, body, head)
        own_attention = module.config._attn_implementation
        module.set_attn_implementation(attention.NAME)
    _turn_linear(module)
    linear_modules = _linear_modules(module, head)
    if not linear_modules:
        raise UnsupportedModelError(f"{name}: it has no linear layer that can carry an adapter")
    lean_norms(module)
    lean_gates(module)
    model = BaseModel(
        name=name,
        module=module,
        body=body,
        head=head,
        tokenizer=tokenizer,
        vocabulary_size=head.weight.shape[0],
        context_length=context,
        device=str(head.weight.device),
        linear_modules=linear_modules,
        end_tokens=_end_tokens(module, tokenizer),
        references=references,
        tokenizer_files=tokenizer_files or {},
        logit_scale=logit_scale,
    )
    with refusing(name):
        _check(model, own_attention)
        if model.dtype.itemsize < torch.float32.itemsize:
            with widened(body):
                _check(model, own_attention)
    return model


def _check(model: BaseModel, own_attention: str) -> None:
    model.layer_shapes, seen = see_layers(model)
    model.context_length = min(model.context_length, seen)
    check_packing(model, own_attention)
    check_decoding(model)


def _carry_adapters(module: nn.Module, head: nn.Module, scope: LoraScope) -> dict[str, nn.Linear]:
    """Puts a `LoraLinear` in the place of every linear layer but the head."""
    found = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    layers: dict[str, nn.Linear] = {}
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        layers[name] = LoraLinear(layer, name, scope)
        setattr(module.get_submodule(parent), last, layers[name])
    return layers


def _share_of_linear(model: BaseModel) -> float:
    """How much of the frozen weights is in linear layers, the head's and embeddings'."""
    holders = (nn.Linear, nn.Embedding)
    weights = {
        id(part.weight): part.weight.numel()
        for part in model.module.modules()
        if isinstance(part, holders)
    }
    return sum(weights.values()) / max(1, model.parameters)


def _turn_linear(module: nn.Module) -> None:
    """GPT-2 and its kin keep the weights of their linear layers the other way round."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D):
            linear = nn.Linear(layer.nx, layer.nf, device="meta")
            linear.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)
            linear.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, linear)


def _linear_modules(module: nn.Module, head: nn.Linear) -> dict[str, int]:
    """Of those that adapters may go on: what is saved must mean the same to plain `peft`, which a
    bare number, as in a list of layers, does not."""
    names = (
        name.rsplit(".", 1)[-1]
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    )
    counts = Counter(name for name in names if not name.isdigit())
    others = read_otherwise(module, counts)
    return {name: count for name, count in counts.items() if name not in others}


def _longest_token(tokenizer: Any) -> int:
    """Characters of the vocabulary's longest token; 0 without tokenizer."""
    return max(map(len, tokenizer.get_vocab()), default=0) if tokenizer is not None else 0


def _end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    generation = getattr(module, "generation_config", None)
    for holder in (generation, module.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(found)
