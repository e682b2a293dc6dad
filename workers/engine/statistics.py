"""What losses read of each position's distribution, from one chunked sweep over the head.

Beside the targets' log-probabilities a loss may ask for more. All logits never exist at once, and
each statistic's gradient is made in the same sweep: with p the distribution, x its logits and q the
reference's, and E an expectation,

    logprob of t     ∂/∂x = onehot(t) − p
    mean logprob     1/V − p
    entropy          −p·(x − E_p[x])
    KL(p ‖ q)        p·(log p − log q − KL)
    KL(q ‖ p)        p − q
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.head import chunk_logits, target_logprobs
from workers.losses import Statistic


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of S positions, float32 or the model's wider type; what was not asked for is None.

    Attributes:
        logprobs: [S] or [S, K], as the targets.
        reference_logprobs: the same under the reference, without gradient.
        mean_logprobs, entropy, kl, forward_kl: [S].
    """

    logprobs: Tensor
    mean_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None
    kl: Tensor | None = None
    forward_kl: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those that there are."""
        pairs = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return {name: values for name, values in pairs if values is not None}

    def split(self, sizes: list[int]) -> list[Statistics]:
        """Those of neighbouring positions."""
        parts = {name: torch.split(values, sizes) for name, values in self.named().items()}
        return [
            Statistics(**{name: part[index] for name, part in parts.items()})
            for index in range(len(sizes))
        ]


def measure(
    head: torch.nn.Linear,
    hidden_SD: Tensor,
    targets: Tensor,
    wanted: Collection[Statistic],
    reference_SD: Tensor | None = None,
) -> Statistics:
    """The targets' log-probabilities and what else is wanted, differentiable by the hidden states.

    Args:
        head: frozen.
        hidden_SD: the scored positions' hidden states.
        targets: int64 [S] or [S, K].
        wanted: further statistics; each costs a product with the head.
        reference_SD: the reference's hidden states, for statistics that compare with it.
    """
    weight, bias = head.weight, head.bias
    if not wanted and targets.ndim == 1:
        return Statistics(target_logprobs(hidden_SD, weight, bias, targets))
    names = [statistic for statistic in Statistic if statistic in wanted]
    targets_SK = targets if targets.ndim > 1 else targets[:, None]
    logprobs_SK, *others = _Sweep.apply(  # type: ignore[no-untyped-call]
        hidden_SD, weight, bias, targets_SK, names, reference_SD
    )
    found = {
        name.value: other.reshape(targets.shape) if name is Statistic.REFERENCE_LOGPROB else other
        for name, other in zip(names, others, strict=True)
    }
    return Statistics(logprobs_SK.reshape(targets.shape), **found)


class _Sweep(torch.autograd.Function):
    """Outputs: log-probabilities [S, K], then each named statistic [S] (reference: [S, K])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_SK: Tensor,
        names: list[Statistic],
        reference_SD: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(hidden_SD.dtype, torch.float32)
        count, vocabulary = len(targets_SK), weight_VD.shape[0]
        outputs = [torch.empty(targets_SK.shape, dtype=wide, device=hidden_SD.device)]
        for name in names:
            shape = targets_SK.shape if name is Statistic.REFERENCE_LOGPROB else (count,)
            outputs.append(torch.empty(shape, dtype=wide, device=hidden_SD.device))
        # p·W serves the targets' and the mean's gradients; the others need a product each.
        keeps = ctx.needs_input_grad[0]
        expected_SD = torch.empty_like(hidden_SD) if keeps else None
        slopes = {
            name: torch.empty_like(hidden_SD)
            for name in names
            if keeps and name in (Statistic.ENTROPY, Statistic.KL, Statistic.FORWARD_KL)
        }
        chunk = max(1, min(count, max(32, chunk_logits(hidden_SD.device) // vocabulary)))
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            logits_CV = _logits(hidden_SD[part], weight_VD, bias_V, wide)
            logs_CV = torch.log_softmax(logits_CV, 1)
            probabilities_CV = logs_CV.exp()
            outputs[0][part] = logs_CV.gather(1, targets_SK[part])
            if expected_SD is not None:
                torch.mm(_as(probabilities_CV, weight_VD), weight_VD, out=expected_SD[part])
            reference_CV = None
            if reference_SD is not None:
                logits_CV = _logits(reference_SD[part], weight_VD, bias_V, wide)
                reference_CV = torch.log_softmax(logits_CV, 1)
            for name, output in zip(names, outputs[1:], strict=True):
                value, slope_CV = _statistic(
                    name, logs_CV, probabilities_CV, reference_CV, targets_SK[part]
                )
                output[part] = value
                if name in slopes and slope_CV is not None:
                    torch.mm(_as(slope_CV, weight_VD), weight_VD, out=slopes[name][part])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(
                output
                for name, output in zip(names, outputs[1:], strict=True)
                if name is Statistic.REFERENCE_LOGPROB
            )
        )
        if keeps:
            ctx.names, ctx.slopes = names, list(slopes)
            ctx.save_for_backward(expected_SD, weight_VD, targets_SK, *slopes.values())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        expected_SD, weight_VD, targets_SK, *kept = ctx.saved_tensors
        slopes = dict(zip(ctx.slopes, kept, strict=True))
        grad_SK, others = grads[0], dict(zip(ctx.names, grads[1:], strict=True))
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        total_SD = torch.zeros(expected_SD.shape, dtype=wide, device=expected_SD.device)
        if grad_SK is not None:
            for target, grad in zip(targets_SK.unbind(1), grad_SK.unbind(1), strict=True):
                total_SD += grad[:, None] * weight_VD.index_select(0, target)
            total_SD -= grad_SK.sum(1, keepdim=True) * expected_SD
        grad_mean = others.get(Statistic.MEAN_LOGPROB)
        if grad_mean is not None:
            even_D = weight_VD.mean(0, dtype=wide)
            total_SD += grad_mean[:, None] * (even_D - expected_SD)
        for name, slope_SD in slopes.items():
            grad = others[name]
            if grad is not None:
                total_SD += grad[:, None] * slope_SD
        return total_SD.to(expected_SD.dtype), None, None, None, None, None


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wide: torch.dtype
) -> Tensor:
    return torch.nn.functional.linear(hidden_CD, weight_VD, bias_V).to(wide)


def _as(matrix_CV: Tensor, weight_VD: Tensor) -> Tensor:
    return matrix_CV.to(weight_VD.dtype)


def _statistic(
    name: Statistic,
    logs_CV: Tensor,
    probabilities_CV: Tensor,
    reference_CV: Tensor | None,
    targets_CK: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """A chunk's values, and their gradient by the logits where p·W does not give it."""
    if name is Statistic.MEAN_LOGPROB:
        return logs_CV.mean(1), None
    if name is Statistic.ENTROPY:
        # The entropy is −E[log p]: log p differs from x by what is the same for all v.
        negative = (probabilities_CV * logs_CV).sum(1, keepdim=True)
        return -negative[:, 0], -probabilities_CV * (logs_CV - negative)
    if reference_CV is None:
        raise ValueError(f"{name.value} needs the reference's hidden states")
    if name is Statistic.REFERENCE_LOGPROB:
        return reference_CV.gather(1, targets_CK), None
    if name is Statistic.KL:
        gap_CV = logs_CV - reference_CV
        distance = (probabilities_CV * gap_CV).sum(1, keepdim=True)
        return distance[:, 0], probabilities_CV * (gap_CV - distance)
    likely_CV = reference_CV.exp()
    distance = (likely_CV * (reference_CV - logs_CV)).sum(1)
    return distance, probabilities_CV - likely_CV
