"""Log-probabilities of target tokens from hidden states, without ever holding all logits."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.engine.dividing import product

_CHUNK_LOGITS_CPU, _CHUNK_LOGITS_GPU = 3 * 2**21, 2**25
"""Float32 logits held at a time, 24 and 128 MiB, and twice as many in bfloat16: enough rows that
the head's weight is read few times."""
_TILE_ROWS = 16
"""Rows of them whose softmax a CPU makes at once: in float32 its caches hold these, not the chunk.
Per 128 rows of 49,152 logits 6.0 ms of CPU time against 8.2 ms for all at once."""


def chunk_logits(device: torch.device) -> int:
    """How many logits are held at a time, in float32."""
    return _CHUNK_LOGITS_CPU if device.type == "cpu" else _CHUNK_LOGITS_GPU


def target_logprobs(
    hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor
) -> Tensor:
    """float32 [S]: log softmax(hidden·Wᵀ + b) at each target.

    The head is frozen, so its gradient is not made; the hidden states' gradient is, in the same
    sweep over the chunks, if they need one. The softmax is in float32 whatever the head's dtype.

    Args:
        hidden_SD: the scored positions' hidden states.
        weight_VD: the head's weight.
        bias_V: the head's bias, if it has one.
        targets_S: int64 token ids.
    """
    logprobs: Tensor = _TargetLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_SD, weight_VD, bias_V, targets_S
    )
    return logprobs


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_S: Tensor,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        wide = torch.promote_types(hidden_SD.dtype, torch.float32)
        count, vocabulary = len(targets_S), weight_VD.shape[0]
        logprobs_S = torch.empty(count, dtype=wide, device=hidden_SD.device)
        grad_SD = torch.empty_like(hidden_SD) if wants_grad else None
        held = 4 * chunk_logits(hidden_SD.device) // hidden_SD.element_size()
        rows = max(32, held // vocabulary)
        # As many chunks as that takes, of like size.
        chunk = max(1, -(-count // max(1, -(-count // rows))))
        tile = _TILE_ROWS if hidden_SD.device.type == "cpu" else chunk
        # Filled again and again: fresh memory would cost more than what is computed in it.
        logits = torch.empty(chunk, vocabulary, dtype=hidden_SD.dtype, device=hidden_SD.device)
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            logits_CV = logits[: part.stop - part.start]
            sizes = len(logits_CV), weight_VD.numel()
            product(*sizes, torch.mm, hidden_SD[part], weight_VD.t(), out=logits_CV)
            if bias_V is not None:
                logits_CV += bias_V
            tiles = (
                torch.split(whole, tile)
                for whole in (logits_CV, targets_S[part, None], logprobs_S[part])
            )
            for logits_TV, targets_T1, logprobs_T in zip(*tiles, strict=True):
                logprobs_T.copy_(_softmax_slope_(logits_TV, targets_T1, wide, wants_grad))
            if grad_SD is not None:
                product(*sizes, torch.mm, logits_CV, weight_VD, out=grad_SD[part])
        if grad_SD is not None:
            ctx.save_for_backward(grad_SD)
        return logprobs_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_SD,) = ctx.saved_tensors
        return (grads[0][:, None] * grad_SD).neg_().to(grad_SD.dtype), None, None, None


def _softmax_slope_(
    logits_TV: Tensor, targets_T1: Tensor, wide: torch.dtype, wants_slope: bool
) -> Tensor:
    """The targets' log-probabilities [T], in the wide type.

    If wanted, logits become softmax − onehot, the negative of d logprob / d logits.
    """
    powers_TV = logits_TV.to(wide)
    top_T = powers_TV.amax(1)
    below_top = powers_TV.gather(1, targets_T1)[:, 0] - top_T
    torch.softmax(powers_TV, 1, out=powers_TV)
    # log softmax = logit − top + log softmax(top), and softmax(top) never underflows.
    logprobs_T = below_top + powers_TV.amax(1).log_()
    if wants_slope:
        powers_TV.scatter_(1, targets_T1, powers_TV.gather(1, targets_T1) - 1)
        logits_TV.copy_(powers_TV)
    return logprobs_T
