"""The losses' formulae once more, in NumPy and float64, with their gradients by hand.

Written from the papers, and apart from what it is compared with: nothing of `workers` is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Case:
    """Scored positions of whole datums, end to end.

    Attributes:
        logits, reference: [S, V].
        lengths: of each datum.
        targets: [S] or [S, K].
        weights: like the targets.
        inputs: name → [S], or like the targets.
    """

    logits: Array
    reference: Array
    lengths: list[int]
    targets: Array
    weights: Array
    inputs: dict[str, Array]

    @property
    def datums(self) -> list[slice]:
        ends = np.cumsum(self.lengths)
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]


@dataclass
class Answer:
    """What a loss must give.

    Attributes:
        loss: reduced.
        slopes: [S, V], its gradient by the logits.
        metrics, outputs: those that it defines.
    """

    loss: float
    slopes: Array
    metrics: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def answer(name: str, options: dict[str, Any], reduction: str, case: Case) -> Answer:
    """The value, gradient, metrics and outputs of one call."""
    logs = log_softmax(case.logits)
    p = np.exp(logs)
    targets = case.targets if case.targets.ndim > 1 else case.targets[:, None]
    weights = case.weights if case.weights.ndim > 1 else case.weights[:, None]
    lp = np.take_along_axis(logs, targets, 1)
    if name == "dpo":
        return _dpo(options, reduction, case, p, targets)
    scale = _scale(name, reduction, case)[:, None]
    factor = weights * scale
    terms, by_lp, by_logits, metrics, outputs = _terms(name, options, case, logs, lp)
    slopes = factor.sum(1, keepdims=True) * by_logits
    weighted = factor * by_lp
    for k in range(targets.shape[1]):
        slopes[np.arange(len(lp)), targets[:, k]] += weighted[:, k]
    slopes -= weighted.sum(1, keepdims=True) * p
    return Answer(float((factor * terms).sum()), slopes, metrics, outputs)


def _scale(name: str, reduction: str, case: Case) -> Array:
    """[S]: what each position's weighted term counts in the reduced loss."""
    size = len(case.logits)
    if reduction == "sum":
        return np.ones(size)
    each = case.weights if case.weights.ndim == 1 else case.weights.sum(1)
    counts = each if name == "cross_entropy" else np.ones(size)
    if reduction == "token_mean":
        return np.full(size, 1 / counts.sum())
    scale = np.empty(size)
    for datum in case.datums:
        scale[datum] = 1 / counts[datum].sum() / len(case.lengths)
    return scale


def _terms(
    name: str, options: dict[str, Any], case: Case, logs: Array, lp: Array
) -> tuple[Array, Array, Array, dict[str, float], dict[str, Array]]:
    """Terms [S, K], ∂/∂ logprob [S, K], ∂/∂ logits beside that [S, V], metrics, outputs."""
    p, size = np.exp(logs), len(lp)
    nothing = np.zeros_like(logs)
    if name == "cross_entropy":
        e = options.get("label_smoothing", 0.0)
        mean = logs.mean(1, keepdims=True)
        return -(1 - e) * lp - e * mean, np.full_like(lp, e - 1), e * (p - 1 / p.shape[1]), {}, {}
    if name == "linear":
        g = case.inputs["gradients"].reshape(lp.shape)
        value = options.get("value")
        terms = g * lp if value is None else np.full_like(lp, value)
        return terms, g, nothing, {}, {}
    if name == "kl":
        forward = options.get("direction") == "forward"
        values, slopes = _kl(logs, log_softmax(case.reference), forward)
        kl = values[:, 0]
        return values, np.zeros_like(lp), slopes, {"kl": kl.mean()}, {"kl": kl}
    q = case.inputs["logprobs"][:, None]
    advantages = case.inputs["advantages"][:, None]
    r = np.exp(lp - q)
    metrics = {
        "ratio_max": r.max(),
        "ratio_min": r.min(),
        "approx_kl": (r - 1 - np.log(r)).mean(),
    }
    outputs: dict[str, Array] = {}
    low = options.get("clip_low", {"ppo": 0.8, "cispo": 0.0, "gspo": 1 - 3e-4}.get(name))
    high = options.get("clip_high", {"ppo": 1.2, "cispo": 4.0, "gspo": 1 + 4e-4}.get(name))
    if name == "importance_sampling":
        terms, by_lp = -r * advantages, -r * advantages
    elif name == "dro":
        beta = options.get("beta", 0.05)
        terms = -(lp * advantages - 0.5 * beta * (lp - q) ** 2)
        by_lp = -(advantages - beta * (lp - q))
    elif name == "cispo":
        c = np.clip(r, low, high)
        terms, by_lp = -c * lp * advantages, -c * advantages
        metrics["clip_fraction"] = ((r < low) | (r > high)).mean()
    else:
        if name == "gspo":
            for datum in case.datums:
                r[datum] = np.exp((lp - q)[datum].mean())
            outputs["sequence_ratio"] = np.array([r[datum][0, 0] for datum in case.datums])
        cut = ((r > high) & (advantages > 0)) | ((r < low) & (advantages < 0))
        terms = -np.where(cut, np.clip(r, low, high), r) * advantages
        by_lp = np.where(cut, 0.0, -r * advantages)
        metrics["clip_fraction"] = cut.mean()
    slopes = nothing
    if (coefficient := options.get("entropy_coef")) is not None:
        entropy = -(p * logs).sum(1, keepdims=True)
        terms = terms - coefficient * entropy
        slopes = slopes + coefficient * p * (logs + entropy)
        metrics["entropy"], outputs["entropy"] = entropy.mean(), entropy[:, 0]
    if (coefficient := options.get("kl_coef")) is not None:
        values, by_logits = _kl(logs, log_softmax(case.reference), False)
        terms, slopes = terms + coefficient * values, slopes + coefficient * by_logits
        metrics["kl"], outputs["kl"] = values.mean(), values[:, 0]
    assert terms.shape == (size, 1)
    return terms, by_lp, slopes, metrics, outputs


def _kl(logs: Array, others: Array, forward: bool) -> tuple[Array, Array]:
    if forward:
        q = np.exp(others)
        return (q * (others - logs)).sum(1, keepdims=True), np.exp(logs) - q
    p = np.exp(logs)
    values = (p * (logs - others)).sum(1, keepdims=True)
    return values, p * (logs - others - values)


def _dpo(options: dict[str, Any], reduction: str, case: Case, p: Array, targets: Array) -> Answer:
    beta, e = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    lp = np.log(np.take_along_axis(p, targets, 1))[:, 0]
    if "reference_logprobs" in case.inputs:
        q = case.inputs["reference_logprobs"]
    elif options.get("reference") == "none":
        q = np.zeros_like(lp)
    else:
        q = np.take_along_axis(log_softmax(case.reference), targets, 1)[:, 0]
    rewards = np.array([beta * (case.weights * (lp - q))[datum].sum() for datum in case.datums])
    margins = rewards[::2] - rewards[1::2]

    def softplus(x: Array) -> Array:
        return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)

    pairs = (1 - e) * softplus(-margins) + e * softplus(margins)
    sigmoid = 1 / (1 + np.exp(-margins))
    by_margin = -(1 - e) * (1 - sigmoid) + e * sigmoid
    share = 1.0 if reduction == "sum" else 1 / len(margins)
    slopes = np.zeros_like(p)
    for index, datum in enumerate(case.datums):
        sign = 1 if index % 2 == 0 else -1
        by_lp = share * by_margin[index // 2] * sign * beta * case.weights[datum]
        slopes[datum] = -by_lp[:, None] * p[datum]
        slopes[np.arange(datum.start, datum.stop), targets[datum, 0]] += by_lp
    metrics = {
        "margin": margins.mean(),
        "accuracy": (margins > 0).mean(),
        "chosen_reward": rewards[::2].mean(),
        "rejected_reward": rewards[1::2].mean(),
    }
    return Answer(float(share * pairs.sum()), slopes, metrics, {"reward": rewards})
