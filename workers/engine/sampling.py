"""Text generation, batched over prompts with a key-value cache.

Each draw is a function of (seed, operation, prompt, sample, position), so a completion does not
depend on which others are generated beside it, but for float rounding.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.prompts import EncodedPrompt, completion_text
from workers.engine.randomness import derive, uniform
from workers.engine.stops import StopRule
from workers.operations import Completion, FinishReason, SamplingParams

_KEEP_SHARE = 0.75
_LEAST_TEMPERATURE = 1e-30


@dataclass(slots=True)
class _Row:
    """One completion on its way."""

    prompt: EncodedPrompt
    sample: int
    key: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    ended_by_token: bool = False

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.tokens) >= self.limit


@torch.no_grad()
def generate(
    model: BaseModel,
    prompts: list[EncodedPrompt],
    params: SamplingParams,
    seed: int,
    operation: str | int,
    token_budget: int,
) -> list[Completion]:
    """Continues every prompt `num_samples` times with the adapter that is active.

    Args:
        seed: the call's own, or the run's.
        operation: what tells this call's draws from those of others under the same seed; with the
            call's own seed, the same for every call.
        token_budget: most tokens held in one cache, prompt and completion, unless a single
            prompt's samples need more.
    """
    stop = StopRule(model, params.stop)
    finished: dict[tuple[int, int], _Row] = {}
    for group in _groups(prompts, params, token_budget):
        rows = _rows(model, group, params, seed, operation)
        _decode(model, group, rows, params, stop)
        finished |= {(row.prompt.index, row.sample): row for row in rows}
    return [_completion(model, finished[key], stop) for key in sorted(finished)]


def _groups(
    prompts: list[EncodedPrompt], params: SamplingParams, token_budget: int
) -> list[list[EncodedPrompt]]:
    """Prompts of like length together, as many as the budget takes."""
    groups: list[list[EncodedPrompt]] = []
    longest = 0
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.tokens)):
        count = (len(groups[-1]) + 1) * params.num_samples if groups else 0
        if groups and count * (longest + params.max_tokens) <= token_budget:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
            longest = len(prompt.tokens)
    return groups


def _rows(
    model: BaseModel,
    group: list[EncodedPrompt],
    params: SamplingParams,
    seed: int,
    operation: str | int,
) -> list[_Row]:
    return [
        _Row(
            prompt,
            sample,
            derive(seed, "sample", operation, prompt.index, sample),
            min(params.max_tokens, model.context_length - len(prompt.tokens)),
        )
        for prompt in group
        for sample in range(params.num_samples)
    ]


def _decode(
    model: BaseModel,
    group: list[EncodedPrompt],
    rows: list[_Row],
    params: SamplingParams,
    stop: StopRule,
) -> None:
    mask, logits, cache = _prefill(model, group)
    if params.num_samples > 1:
        cache.batch_repeat_interleave(params.num_samples)
        logits = logits.repeat_interleave(params.num_samples, dim=0)
        mask = mask.repeat_interleave(params.num_samples, dim=0)
    live = rows
    while True:
        _draw(live, logits, params, stop)
        going = [index for index, row in enumerate(live) if not row.ended]
        if not going:
            return
        if len(going) <= _KEEP_SHARE * len(live):
            # Ended rows are cut out now and then, since each cut copies the cache.
            kept = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(kept)
            mask, live = mask[kept], [live[index] for index in going]
        newest = torch.tensor(
            [[row.tokens[-1] if row.tokens else 0] for row in live], device=mask.device
        )
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        logits, cache = _step(model, newest, mask, cache)


def _prefill(model: BaseModel, group: list[EncodedPrompt]) -> tuple[Tensor, Tensor, Any]:
    """Mask [R, T], logits [R, V] after the last token, and cache of prompts padded on the left."""
    longest = max(len(prompt.tokens) for prompt in group)
    ids = np.zeros((len(group), longest), np.int64)
    mask = np.zeros((len(group), longest), np.int64)
    for row, prompt in enumerate(group):
        ids[row, longest - len(prompt.tokens) :] = prompt.tokens
        mask[row, longest - len(prompt.tokens) :] = 1
    mask_RT = torch.from_numpy(mask).to(model.device)
    logits, cache = _step(model, torch.from_numpy(ids).to(model.device), mask_RT, None)
    return mask_RT, logits, cache


def _step(model: BaseModel, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Float32 logits [R, V] after the last of `ids` [R, T], and the cache with them in it."""
    extra = {}
    if model.takes_positions:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        extra["position_ids"] = positions[:, -ids.shape[1] :]
    output = model.body(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
    )
    last_RD = output.last_hidden_state[:, -1]
    return model.head(last_RD).float(), output.past_key_values


def _draw(live: list[_Row], logits: Tensor, params: SamplingParams, stop: StopRule) -> None:
    """Adds one token to every row that has not ended."""
    uniforms = [uniform(row.key, len(row.tokens)) for row in live]
    tokens, logprobs = pick(logits, params, uniforms)
    raw = torch.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0]
    # One transfer from the device; a token id is exact in float64.
    drawn = torch.stack([tokens.double(), logprobs.double(), raw.double()]).tolist()
    for row, token, logprob, raw_logprob in zip(live, *drawn, strict=True):
        if row.ended:
            continue
        if math.isnan(logprob):
            raise TenSafeFault(
                "NON_FINITE_LOSS",
                "the model's logits are NaN or infinite; load an earlier state of the run",
            )
        row.tokens.append(int(token))
        row.logprobs.append(logprob)
        row.raw_logprobs.append(raw_logprob)
        row.ended_by_token = stop.is_end_token(int(token))
        row.stopped = row.ended_by_token or stop.completes_text(row.tokens)


def pick(logits_RV: Tensor, params: SamplingParams, uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """Token ids [R] and their log-probabilities [R] under the distribution sampled from.

    Temperature, then top_k, then top_p (Holtzman et al. 2019), then min_p; then the inverse of the
    cumulative distribution at each row's number in [0, 1). At temperature 0 the whole probability
    lies on the likeliest token, whose log-probability therefore is 0. NaN logits give NaN.
    """
    if params.temperature == 0:
        best = logits_RV.max(dim=1)
        return best.indices, best.values - best.values
    # The maximum goes first and the divisor stays in float32's range, so that a tiny temperature
    # only makes all but the likeliest impossible instead of overflowing.
    below_best = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    scaled = _keep_likely(below_best / max(params.temperature, _LEAST_TEMPERATURE), params)
    logprobs = torch.log_softmax(scaled, dim=1)
    cumulative = logprobs.double().exp_().cumsum_(dim=1)
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None]
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    drawn = drawn.clamp_max(logits_RV.shape[1] - 1)
    return drawn[:, 0], logprobs.gather(1, drawn)[:, 0]


def _keep_likely(scaled: Tensor, params: SamplingParams) -> Tensor:
    """Sets what the options leave out to −∞."""
    if 0 < params.top_k < scaled.shape[1]:
        least = scaled.topk(params.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if params.top_p < 1:
        ordered = scaled.sort(dim=1, descending=True, stable=True)
        probabilities = ordered.values.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        outside = torch.zeros_like(scaled, dtype=torch.bool)
        outside.scatter_(1, ordered.indices, before >= params.top_p)
        scaled = scaled.masked_fill(outside, -torch.inf)
    if params.min_p > 0:
        probabilities = scaled.softmax(dim=1)
        least = params.min_p * probabilities.amax(dim=1, keepdim=True)
        scaled = scaled.masked_fill(probabilities < least, -torch.inf)
    return scaled


def _completion(model: BaseModel, row: _Row, stop: StopRule) -> Completion:
    told = row.tokens[:-1] if row.ended_by_token else row.tokens
    return Completion(
        prompt_index=row.prompt.index,
        prompt=row.prompt.text,
        text=stop.cut(completion_text(model, row.prompt, told)),
        tokens=np.asarray(row.tokens, np.int32),
        logprobs=np.asarray(row.logprobs, np.float32),
        raw_logprobs=np.asarray(row.raw_logprobs, np.float32),
        finish_reason=FinishReason.STOP if row.stopped else FinishReason.LENGTH,
        prompt_tokens=len(row.prompt.tokens),
    )
