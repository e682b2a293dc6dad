"""Attention over documents laid end to end: each token sees its own document up to itself.

Registered with `transformers` as `tensafe`, so that its decoder models work unchanged. A call that
brings a `packing` runs here, or in whatever other layout of tokens that is; any other call is
`transformers`' own SDPA.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tensafe"


class Layout(Protocol):
    """How the tokens of a pass belong together."""

    def attend(
        self,
        module: Any,
        q_NHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[N, H, E] of one layer; the values' E may differ from that of queries and keys.

        Args:
            module: the layer's own attention module, with its `layer_idx`.
            window: how many tokens each one sees, itself among them; None for all.
        """


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention interface: [1, H, N, E] in, [1, N, H, E] out."""
    if packing is None:
        if sliding_window is not None:
            options["sliding_window"] = sliding_window
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    names = ("softcap", "s_aux", "position_bias")
    refused = [name for name in names if options.get(name) is not None]
    if refused or not options.get("is_causal", getattr(module, "is_causal", True)):
        lacking = ", ".join(refused) or "two-way attention"
        raise NotImplementedError(f"packed attention has no {lacking}; use a model without it")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_NHE, k_NGE, v_NGE = (part[0].transpose(0, 1) for part in (query, key, value))
    return packing.attend(module, q_NHE, k_NGE, v_NGE, scale, sliding_window)[None], None


def register() -> None:
    """Makes the name known to `transformers`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
