"""Dropout whose mask is a function of (seed, operation, row, position, module, feature)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.randomness import int32_key, mix32

_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - 2**32


@dataclass(slots=True)
class DropoutScope:
    """What the pass at hand drops: int32 `token_keys` [B, T], or None for no dropout at all."""

    token_keys: Tensor | None = None


def token_keys(seed: int, operation: int, rows: Tensor, length: int) -> Tensor:
    """Keys [B, T] of the tokens of one pass.

    Args:
        seed: the run's.
        operation: the run's count of forward_backward calls that took effect.
        rows: int32 [B], each row's index in its batch.
        length: T; the padding's keys are made too, and used by nobody.
    """
    row_keys = mix32(rows ^ int32_key(seed, "dropout", operation))
    positions = torch.arange(length, dtype=torch.int32, device=rows.device)
    return mix32(row_keys[:, None] + positions)


class CounterDropout(nn.Module):
    """Inverted dropout in place of `lora_dropout`; passes its input through outside a scope.

    Args:
        p: probability of zeroing an input, 0 < p < 1.
        module_name: what tells this module's masks from its neighbours'.
        scope: shared with whoever runs the pass.
    """

    def __init__(self, p: float, module_name: str, scope: DropoutScope) -> None:
        super().__init__()
        self.p = p
        self._module_key = int32_key(0, "module", module_name)
        self._scope = scope

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` [..., F], the leading dimensions those of the scope's token keys."""
        keys = self._scope.token_keys
        if keys is None:
            return inputs
        tokens = mix32(keys ^ self._module_key).reshape(inputs.shape[:-1])
        mask = keep_mask(tokens, inputs.shape[-1], self.p)
        kept: Tensor = _Dropout.apply(inputs, mask, self.p)  # type: ignore[no-untyped-call]
        return kept

    def extra_repr(self) -> str:
        return f"p={self.p}"


def keep_mask(tokens: Tensor, features: int, p: float) -> Tensor:
    """bool [..., F]: which of each token's F inputs stay, each with probability 1 − p."""
    columns = mix32(torch.arange(features, dtype=torch.int32, device=tokens.device))
    bits = tokens[..., None] ^ columns
    # A shorter finaliser than mix32 (constants of Chris Wellons' lowbias32): both halves of the
    # key are mixed already, and only the upper bits decide.
    bits *= _MULTIPLY_1
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _MULTIPLY_2
    threshold = round(p * 2**32) - 2**31
    if threshold >= 2**31:
        # p rounds to 1, and the comparison would wrap round to keeping everything.
        return torch.zeros_like(bits, dtype=torch.bool)
    return bits >= threshold


class _Dropout(torch.autograd.Function):
    """Keeps the mask as one byte for each input, instead of a float one for the product."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = 1.0 / (1.0 - p)
        return (inputs * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).mul_(ctx.scale), None, None
