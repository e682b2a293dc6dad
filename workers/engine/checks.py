"""What a model is checked for before anybody shares it: a wrong number is worse than a refusal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workers.engine.memory import is_memory_error
from workers.engine.packing import Packing, pack
from workers.engine.sampling.cache import KeyValueCache, LayerShape
from workers.engine.sampling.decoding import Decoding

if TYPE_CHECKING:
    from workers.engine.base_model import BaseModel

_LARGE_LOGIT = 1000.0
_LENGTHS = (37, 20)
"""Of the documents that a model is tried with."""
_TOLERANCE = 3e-5
"""Relative distance from which a model computes something else. Rounding makes 3e-6 of it in
float32; in a narrower type so much that a state between documents hides in it, so that a model of
one is checked in float32 as well."""
_CHOOSING = re.compile(
    "index_(topk|n_heads|head_dim)|indexer_|keep_window|compress_rate|sparse_cfg"
)
"""What the configurations of such models have: DeepSeek V3.2, GLM, MiniMax M3, Doge and others."""


class UnsupportedModelError(Exception):
    """A model that the engine would compute wrongly."""


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Whatever a model does in here that it was not made for is a reason to refuse it.

    Raises:
        UnsupportedModelError: naming the model.
    """
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_memory_error(error):
            raise
        raise UnsupportedModelError(
            f"{name}: it cannot be computed without padding: {error}"
        ) from error


def context_length(config: Any) -> int:
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
def check_head(name: str, module: Any, body: nn.Module, head: nn.Linear) -> float:
    """Some models scale their logits, or the hidden states ahead of the head, and some cap them.

    A cap does next to nothing to small logits, so the head is made to give large ones.

    Returns:
        What hidden states are multiplied by ahead of the head.
    """
    ids = torch.arange(4, device=head.weight.device)[None]
    # By the same factor both times: by one of its own each would hide a scale ahead of the head.
    magnified = _Magnified()
    handle = head.register_forward_hook(magnified)
    try:
        expected = module(input_ids=ids, use_cache=False).logits.float()
        actual = head(body(input_ids=ids, use_cache=False).last_hidden_state).float()
    finally:
        handle.remove()
    ratio = float((expected * actual).sum() / actual.square().sum())
    # As exact as the configuration says it, if it is one that it says.
    scale = min(_scales(module.config.get_text_config()), key=lambda own: abs(own - ratio))
    # Without a scale both are computed alike; with one the model rounds once more, some models
    # each hidden state.
    share = 1e-3 if scale == 1 else max(1e-3, torch.finfo(head.weight.dtype).eps)
    close = torch.allclose(
        expected, scale * actual, rtol=share, atol=share * float(expected.abs().max())
    )
    if not close or (scale != 1 and head.bias is not None):
        raise UnsupportedModelError(
            f"{name}: its logits are not a linear map of its hidden states (capped logits are not "
            "supported); use a model without, such as Llama, Qwen or Gemma 3"
        )
    return scale


class _Magnified:
    """A hook that multiplies logits by what makes its first call's large."""

    def __init__(self) -> None:
        self._factor: Tensor | None = None

    def __call__(self, head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if self._factor is None:
            tiny = torch.finfo(logits.dtype).tiny
            self._factor = _LARGE_LOGIT / logits.abs().max().clamp(min=tiny)
        return logits * self._factor


def _scales(config: Any) -> list[float]:
    """What logits may be multiplied by. Some families multiply by the same word that others divide
    by."""
    values = [getattr(config, word, None) for word in ("logit_scale", "logits_scaling")]
    return [1.0, *(own for value in values if value for own in (float(value), 1 / value))]


def check_attention(name: str, config: Any) -> None:
    """Some models choose for each token which ones it sees, once a row is long."""
    chosen = [key for key, value in config.to_dict().items() if value and _CHOOSING.match(key)]
    if chosen:
        raise UnsupportedModelError(
            f"{name}: its attention chooses which tokens it sees ({', '.join(sorted(chosen))}), "
            "and the engine's sees all; use a model whose attention is dense or has windows"
        )


@torch.no_grad()
def check_packing(model: BaseModel, own_attention: str) -> None:
    """Some models keep to themselves what our attention needs, or mix tokens in other ways.

    Args:
        own_attention: what the model attends with elsewhere.
    """
    lengths = [min(length, model.context_length) for length in _LENGTHS]
    ids = torch.arange(sum(lengths), device=model.device) % model.vocabulary_size
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    packed = model.hidden(ids, positions, pack(lengths, model.device))
    ours = model.module.config._attn_implementation
    model.module.set_attn_implementation(own_attention)
    try:
        alone = [
            model.body(input_ids=part[None], use_cache=False)
            for part in (ids[: lengths[0]], ids[lengths[0] :])
        ]
    finally:
        model.module.set_attn_implementation(ours)
    expected = model.logit_scale * torch.cat([output.last_hidden_state[0] for output in alone])
    if _differ(packed, expected):
        raise UnsupportedModelError(f"{model.name}: its documents cannot be laid end to end")


def _differ(found: Tensor, expected: Tensor) -> bool:
    narrow = found.dtype.itemsize < torch.float32.itemsize
    tolerance = 2 * torch.finfo(found.dtype).eps ** 0.5 if narrow else _TOLERANCE
    distance = (found - expected).float().norm() / expected.float().norm()
    return not distance <= tolerance


@dataclass(slots=True)
class _Seen:
    """A pass that keeps what each layer's attention brings.

    Attributes:
        shapes: by the layer's number.
        windows: how many tokens each one sees; None for all.
    """

    packing: Packing
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,  # noqa: N803 - the suffixes give shapes
        k_NGE: Tensor,  # noqa: N803
        v_NGE: Tensor,  # noqa: N803
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See `Layout`."""
        layer = module.layer_idx
        self.shapes[layer] = LayerShape(k_NGE.shape[1], k_NGE.shape[2], v_NGE.shape[2])
        self.windows[layer] = window
        return self.packing.attend(module, q_NHE, k_NGE, v_NGE, scale, window)


@torch.no_grad()
def see_layers(model: BaseModel) -> tuple[tuple[LayerShape, ...], int]:
    """What a pass shows of each layer's keys and values, and the longest row that the layers
    compute as the model does."""
    seen = _Seen(pack([1], model.device))
    nothing = torch.zeros(1, dtype=torch.int64, device=model.device)
    try:
        model.hidden(nothing, nothing, seen)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{model.name}: its attention layers are not numbered: {error}"
        ) from error
    if not seen.shapes:
        raise UnsupportedModelError(
            f"{model.name}: none of its layers attends through `transformers`' own interface"
        )
    if sorted(seen.shapes) != list(range(len(seen.shapes))):
        raise UnsupportedModelError(f"{model.name}: not all its layers keep keys and values")
    longest = _longest_row(model.module.config.get_text_config(), seen.windows)
    shapes = tuple(seen.shapes[layer] for layer in range(len(seen.shapes)))
    return shapes, int(min(longest, model.context_length))


def _longest_row(config: Any, windows: Mapping[int, int | None]) -> float:
    """Some models tell their windows and chunks to their masks alone, of which a pass has none:
    then rows may be as long as changes nothing."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or math.inf
    chunk = getattr(config, "attention_chunk_size", None) or math.inf
    longest = math.inf
    for layer, own in windows.items():
        kind = kinds[layer] if kinds else None
        if kind in (None, "sliding_attention") and (own or math.inf) > window:
            longest = min(longest, window)
        if kind in (None, "chunked_attention"):
            longest = min(longest, chunk)
    return longest


@torch.no_grad()
def check_decoding(model: BaseModel) -> None:
    """Some models keep more of the past than keys and values, or share them between layers."""
    known, count = 4, 7
    ids = torch.arange(count, device=model.device) % model.vocabulary_size
    positions = torch.arange(count, device=model.device)
    expected = model.hidden(ids, positions, pack([count], model.device))
    cache: KeyValueCache[None] = KeyValueCache(
        model.layer_shapes, expected.dtype, model.device, 2**62
    )
    place = cache.take(count, None)
    assert place is not None
    layout = pack([known], model.device)
    layout.keep = place.write
    found = [model.hidden(ids[:known], positions[:known], layout)]
    for token in range(known, count):
        place.length = token
        one = slice(token, token + 1)
        found.append(model.hidden(ids[one], positions[one], Decoding([place], model.device)))
    if _differ(torch.cat(found), expected):
        raise UnsupportedModelError(f"{model.name}: its tokens cannot be added one by one")
