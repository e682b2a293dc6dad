"""Log-probabilities of target tokens from hidden states, without ever holding all logits."""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 2**24
"""Logits held at a time: 64 MiB in float32."""


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
        logprobs_S = torch.empty(len(targets_S), dtype=torch.float32, device=hidden_SD.device)
        grad_SD = torch.empty_like(hidden_SD) if wants_grad else None
        chunk = max(64, _CHUNK_LOGITS // weight_VD.shape[0])
        for begin in range(0, len(targets_S), chunk):
            part = slice(begin, begin + chunk)
            targets = targets_S[part, None]
            logits_CV = torch.nn.functional.linear(hidden_SD[part], weight_VD, bias_V).float()
            lse_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            logprobs_S[part] = (logits_CV.gather(1, targets) - lse_C1).squeeze(1)
            if grad_SD is not None:
                # d logprob / d logits = onehot − softmax
                slope_CV = logits_CV.sub_(lse_C1).exp_().neg_()
                slope_CV.scatter_add_(1, targets, torch.ones_like(lse_C1))
                grad_SD[part] = slope_CV.to(weight_VD.dtype) @ weight_VD
        if grad_SD is not None:
            ctx.save_for_backward(grad_SD)
        return logprobs_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_SD,) = ctx.saved_tensors
        return (grads[0][:, None] * grad_SD).to(grad_SD.dtype), None, None, None
