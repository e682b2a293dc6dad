"""Log-probabilities of target tokens from hidden states, without ever holding all logits."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 3 * 2**21
"""Logits held at a time: 24 MiB in float32, which a CPU's last cache still holds."""


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
        chunk = max(1, min(count, max(32, CHUNK_LOGITS // vocabulary)))
        # Filled again and again: fresh memory would cost more than what is computed in it.
        logits = torch.empty(chunk, vocabulary, dtype=hidden_SD.dtype, device=hidden_SD.device)
        powers = torch.empty(chunk, vocabulary, dtype=wide, device=hidden_SD.device)
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            targets = targets_S[part, None]
            logits_CV, powers_CV = logits[: len(targets)], powers[: len(targets)]
            torch.mm(hidden_SD[part], weight_VD.t(), out=logits_CV)
            if bias_V is not None:
                logits_CV += bias_V
            powers_CV.copy_(logits_CV)
            top_C = powers_CV.amax(1)
            below_top = powers_CV.gather(1, targets)[:, 0] - top_C
            torch.softmax(powers_CV, 1, out=powers_CV)
            # log softmax = logit − top + log softmax(top), and softmax(top) never underflows.
            logprobs_S[part] = below_top + powers_CV.amax(1).log_()
            if grad_SD is not None:
                # d logprob / d logits = onehot − softmax; its negative here
                powers_CV.scatter_(1, targets, powers_CV.gather(1, targets) - 1)
                logits_CV.copy_(powers_CV)
                torch.mm(logits_CV, weight_VD, out=grad_SD[part])
        if grad_SD is not None:
            ctx.save_for_backward(grad_SD)
        return logprobs_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_SD,) = ctx.saved_tensors
        return (grads[0][:, None] * grad_SD).neg_().to(grad_SD.dtype), None, None, None
