"""A frozen base model, ready to carry adapters."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine import attention
from workers.engine.adapters import Adapter, new_adapter
from workers.engine.blocks import Blocks
from workers.engine.gated import lean_gates
from workers.engine.lora import LoraLinear, LoraScope, PassAdapters
from workers.engine.norms import lean_norms
from workers.engine.products import Product, SegmentLoop
from workers.engine.sampling.cache import KeyValueCache, LayerShape
from workers.engine.sampling.decoding import Decoding
from workers.operations import LoraSettings

attention.register()

_LARGE_LOGIT = 1000.0
_LONG_SEGMENT = 128
"""Tokens from which an adapter's products are faster in bfloat16 on a CPU. One of 63 takes 0.17 ms
forward and backward either way, of 254 0.33 against 0.54, of 15 0.13 against 0.06."""


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
        token_bytes: that a training pass keeps for each token, once it was measured.
        references: other names under which tenants may ask for it.
        tokenizer_files: name → content.
        layer_shapes: what each layer's attention keeps of a token.
        longest_text: characters of a text beyond which it cannot fit into the context.
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
    token_bytes: float | None = None

    def __post_init__(self) -> None:
        self.scope = LoraScope()
        self.product: Product = SegmentLoop()
        self.blocks = Blocks(self.body)
        self.longest_text = self.context_length * _longest_token(self.tokenizer)
        self.layers = _carry_adapters(self.module, self.head, self.scope)
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

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
        """Hidden states [N, D] of tokens that belong together as their layout says.

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
    context = _context_length(config)
    if not context:
        raise UnsupportedModelError(f"{name}: its configuration has no max_position_embeddings")
    head = module.get_output_embeddings()
    body = module.base_model
    if not isinstance(head, nn.Linear) or body is module:
        raise UnsupportedModelError(f"{name}: it has no plain linear output head")
    _check_head(name, module, body, head)
    module.set_attn_implementation(attention.NAME)
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
        linear_modules=_linear_modules(module, head),
        end_tokens=_end_tokens(module, tokenizer),
        references=references,
        tokenizer_files=tokenizer_files or {},
    )
    _check_packing(model)
    model.layer_shapes = _layer_shapes(model)
    _check_decoding(model)
    return model


def _context_length(config: Any) -> int:
    """Tokens of the longest row; 0 if the configuration does not say.

    Where positions are turned in another way as soon as one row of a pass is long (longrope), only
    as many as change nothing for the rows beside it.
    """
    context = int(getattr(config, "max_position_embeddings", None) or 0)
    rope = getattr(config, "rope_parameters", None) or {}
    # Models whose layers differ have one for each kind of layer.
    for own in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if own.get("rope_type") == "longrope":
            first = own.get("original_max_position_embeddings")
            first = first or getattr(config, "original_max_position_embeddings", None)
            context = min(context, int(first or context))
    return context


@torch.no_grad()
def _check_head(name: str, module: Any, body: nn.Module, head: nn.Linear) -> None:
    """Some models cap or scale their logits, which the loss would miss.

    A cap does next to nothing to small logits, so the head is made to give large ones.
    """
    ids = torch.arange(4, device=head.weight.device)[None]
    handle = head.register_forward_hook(lambda _head, _inputs, logits: _magnified(logits))
    try:
        expected = module(input_ids=ids, use_cache=False).logits.float()
        actual = head(body(input_ids=ids, use_cache=False).last_hidden_state).float()
    finally:
        handle.remove()
    if not torch.allclose(expected, actual, rtol=1e-3, atol=1e-3 * _LARGE_LOGIT):
        raise UnsupportedModelError(
            f"{name}: its logits are not a linear map of its hidden states (capped or scaled "
            "logits are not supported); use a model without, such as Llama, Qwen or Gemma 3"
        )


def _magnified(logits: Tensor) -> Tensor:
    return logits * (_LARGE_LOGIT / logits.abs().max().clamp(min=torch.finfo(logits.dtype).tiny))


@torch.no_grad()
def _check_packing(model: BaseModel) -> None:
    """Some models keep to themselves what our attention needs, or mix tokens in other ways."""
    lengths = (5, 3)
    ids = torch.arange(sum(lengths), device=model.device) % model.vocabulary_size
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    try:
        packed = model.hidden(ids, positions, attention.pack(lengths, model.device))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{model.name}: {error}") from error
    alone = [
        model.body(input_ids=part[None], use_cache=False)
        for part in (ids[: lengths[0]], ids[lengths[0] :])
    ]
    expected = torch.cat([output.last_hidden_state[0] for output in alone])
    distance = (packed - expected).float().norm() / expected.float().norm()
    if not distance <= 2 * torch.finfo(model.dtype).eps ** 0.5:
        raise UnsupportedModelError(f"{model.name}: its documents cannot be laid end to end")


@torch.no_grad()
def _layer_shapes(model: BaseModel) -> tuple[LayerShape, ...]:
    """What a pass shows of each layer's keys and values."""
    shapes: dict[int, LayerShape] = {}

    def keep(layer: int, k_NGE: Tensor, v_NGE: Tensor) -> None:  # noqa: N803
        shapes[layer] = LayerShape(k_NGE.shape[1], k_NGE.shape[2], v_NGE.shape[2])

    layout = attention.pack([1], model.device)
    layout.keep = keep
    nothing = torch.zeros(1, dtype=torch.int64, device=model.device)
    try:
        model.hidden(nothing, nothing, layout)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{model.name}: its attention layers are not numbered: {error}"
        ) from error
    if sorted(shapes) != list(range(len(shapes))):
        raise UnsupportedModelError(f"{model.name}: not all its layers keep keys and values")
    return tuple(shapes[layer] for layer in range(len(shapes)))


@torch.no_grad()
def _check_decoding(model: BaseModel) -> None:
    """Some models keep more of the past than keys and values, or share them between layers."""
    known, count = 4, 7
    ids = torch.arange(count, device=model.device) % model.vocabulary_size
    positions = torch.arange(count, device=model.device)
    expected = model.hidden(ids, positions, attention.pack([count], model.device))
    cache: KeyValueCache[None] = KeyValueCache(model.layer_shapes, model.dtype, model.device, 2**62)
    place = cache.take(count, None)
    assert place is not None
    layout = attention.pack([known], model.device)
    layout.keep = place.write
    found = [model.hidden(ids[:known], positions[:known], layout)]
    for token in range(known, count):
        place.length = token
        one = slice(token, token + 1)
        found.append(model.hidden(ids[one], positions[one], Decoding([place], model.device)))
    distance = (torch.cat(found) - expected).float().norm() / expected.float().norm()
    if not distance <= 2 * torch.finfo(model.dtype).eps ** 0.5:
        raise UnsupportedModelError(f"{model.name}: its tokens cannot be added one by one")


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


def _linear_modules(module: nn.Module, head: nn.Linear) -> dict[str, int]:
    names = (
        name.rsplit(".", 1)[-1]
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    )
    return dict(Counter(names))


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
