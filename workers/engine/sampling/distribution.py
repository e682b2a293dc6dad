"""From logits to tokens: what each row's options leave, a draw from it, and its log-probabilities.

Temperature, then top_k, then top_p (Holtzman et al. 2019, arXiv 1904.09751), then min_p (Nguyen et
al. 2024, arXiv 2407.01082); then the inverse of the cumulative distribution at the row's number in
[0, 1). Each row by its own options; no row's numbers enter another's.

Shapes: M rows, V tokens of the vocabulary.
"""

# ruff: noqa: N803, N806 - the suffixes give shapes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.operations import SamplingParams

_LEAST_TEMPERATURE = 1e-30
_BLOCK = 256
_NUCLEI = (128, 2048)
"""A nucleus is looked for among so many of the likeliest before everything is sorted."""


@dataclass(slots=True)
class Drawn:
    """One token for each row.

    Attributes:
        tokens: [M].
        logprobs: [M], under the distribution sampled from; 0 at temperature 0.
        raw_logprobs: [M], log softmax of the logits as they are. NaN logits give NaN.
        top_tokens, top_logprobs: for each row its likeliest tokens, as many as it asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]


class Workspace:
    """Large tensors that are filled again and again: fresh memory would cost more than what is
    computed in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
        """[rows, width] of any content; the same memory whenever the name is the same."""
        held = self._held.get(name)
        if held is None or len(held) < rows or held.shape[1] != width or held.dtype != dtype:
            held = self._held[name] = torch.empty(rows, width, dtype=dtype, device=device)
        return held[:rows]

    def like(self, name: str, other: Tensor) -> Tensor:
        """One of that shape, type and device."""
        rows, width = other.shape
        return self.take(name, rows, width, other.dtype, str(other.device))


def draw(
    logits_MV: Tensor,
    params: Sequence[SamplingParams],
    points: Sequence[float],
    workspace: Workspace,
) -> Drawn:
    """Draws a token for each row.

    Args:
        logits_MV: float32 or wider; used up.
        params: each row's options.
        points: each row's number in [0, 1).
    """
    below_MV = logits_MV.sub_(logits_MV.amax(1, keepdim=True))
    shares_MV = torch.softmax(below_MV, 1, out=workspace.like("shares", below_MV))
    # log softmax = logit − top + log softmax(top), and softmax(top) never underflows.
    best_M = shares_MV.amax(1).double().log_()
    tokens_M = torch.empty(len(params), dtype=torch.int64, device=below_MV.device)
    logprobs_M = torch.zeros(len(params), dtype=torch.float64, device=below_MV.device)
    greedy = [row for row, own in enumerate(params) if own.temperature == 0]
    plain = [row for row, own in enumerate(params) if _is_plain(own)]
    shaped = [row for row, own in enumerate(params) if own.temperature and not _is_plain(own)]
    if greedy:
        tokens_M[greedy] = _of(below_MV, greedy).argmax(1)
    if plain:
        tokens_M[plain] = _invert(_of(shares_MV, plain), [points[row] for row in plain])
    if shaped:
        scaled = workspace.take(
            "scaled", len(shaped), below_MV.shape[1], below_MV.dtype, str(below_MV.device)
        )
        _shape(_of(below_MV, shaped), [params[row] for row in shaped], scaled)
        own_shares = torch.softmax(scaled, 1, out=workspace.like("own shares", scaled))
        drawn = _invert(own_shares, [points[row] for row in shaped])
        tokens_M[shaped] = drawn
        own_best = own_shares.amax(1).double().log_()
        logprobs_M[shaped] = scaled.gather(1, drawn[:, None])[:, 0].double() + own_best
    raw_M = below_MV.gather(1, tokens_M[:, None])[:, 0].double() + best_M
    if plain:
        logprobs_M[plain] = raw_M[plain]
    # A token id is exact in float64: one transfer from the device.
    tokens, logprobs, raw = torch.stack([tokens_M.double(), logprobs_M, raw_M]).tolist()
    tops = _likeliest(below_MV, best_M, [own.top_logprobs for own in params])
    return Drawn([int(token) for token in tokens], logprobs, raw, *tops)


def _is_plain(params: SamplingParams) -> bool:
    """Whether it draws from the model's own distribution."""
    return params.temperature == 1 and not (params.top_k or params.top_p < 1 or params.min_p)


def _of(numbers_MV: Tensor, rows: list[int]) -> Tensor:
    """Those rows, without a copy if they are all."""
    return numbers_MV if len(rows) == len(numbers_MV) else numbers_MV[rows]


def _invert(shares_MV: Tensor, points: Sequence[float]) -> Tensor:
    """int64 [M]: where the cumulative sum of each row passes its point's share of the whole.

    First over sums of blocks, then within one: a cumulative sum of everything would take longer
    than all else. A token of probability 0 is never drawn.
    """
    V = shares_MV.shape[1]
    whole = V // _BLOCK
    sums_Mb = shares_MV[:, : whole * _BLOCK].view(len(shares_MV), whole, _BLOCK).sum(2)
    if whole * _BLOCK < V:
        sums_Mb = torch.cat([sums_Mb, shares_MV[:, whole * _BLOCK :].sum(1, keepdim=True)], 1)
    ends_Mb = sums_Mb.double().cumsum(1)
    points_M1 = torch.tensor(points, dtype=torch.float64, device=shares_MV.device)[:, None]
    block_M1, left_M1 = _passed(ends_Mb, points_M1 * ends_Mb[:, -1:])
    places_MB = block_M1 * _BLOCK + torch.arange(_BLOCK, device=shares_MV.device)
    inside_MB = shares_MV.gather(1, places_MB.clamp_max(V - 1)).double()
    inside_MB.masked_fill_(places_MB >= V, 0)
    token_M1, _ = _passed(inside_MB.cumsum(1), left_M1)
    return (block_M1 * _BLOCK + token_M1)[:, 0].clamp_max(V - 1)


def _passed(ends: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[M, 1]: the first place whose end lies beyond `wanted`, and how much of that is left there.

    Rounding may put `wanted` at the last end or beyond, where nothing comes any more.
    """
    below_last = torch.nextafter(ends[:, -1:], torch.zeros_like(wanted))
    wanted = torch.minimum(wanted, below_last)
    place = torch.searchsorted(ends, wanted, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(place > 0, ends.gather(1, (place - 1).clamp_min(0)), 0.0)
    return place, wanted - before


def _shape(below_MV: Tensor, params: Sequence[SamplingParams], scaled_MV: Tensor) -> None:
    """Divides by the temperature and sets what the options leave out to −∞; the best stays 0."""
    device = below_MV.device
    # The maximum is gone already and the divisor stays in float32's range, so that a tiny
    # temperature only makes all but the likeliest impossible instead of overflowing.
    divisors = [max(own.temperature, _LEAST_TEMPERATURE) for own in params]
    divisors_M1 = torch.tensor(divisors, dtype=below_MV.dtype, device=device)[:, None]
    torch.div(below_MV, divisors_M1, out=scaled_MV)
    V = scaled_MV.shape[1]
    limited = [row for row, own in enumerate(params) if 0 < own.top_k < V]
    if limited:
        counts = [params[row].top_k for row in limited]
        likeliest = _of(scaled_MV, limited).topk(max(counts), 1).values
        least = likeliest.gather(1, torch.tensor(counts, device=device)[:, None] - 1)
        _keep_from(scaled_MV, limited, least)
    nuclei = [row for row, own in enumerate(params) if own.top_p < 1]
    if nuclei:
        _keep_nuclei(scaled_MV, nuclei, [params[row].top_p for row in nuclei])
    ratios = [row for row, own in enumerate(params) if own.min_p]
    if ratios:
        least = torch.tensor([params[row].min_p for row in ratios], dtype=torch.float64)
        _keep_from(scaled_MV, ratios, least.log()[:, None].to(scaled_MV))


def _keep_from(scaled_MV: Tensor, rows: list[int], least: Tensor) -> None:
    """Leaves out what is less than its row's `least` [rows, 1]."""
    if len(rows) == len(scaled_MV):
        scaled_MV.masked_fill_(scaled_MV < least, -torch.inf)
        return
    for row, value in zip(rows, least, strict=True):
        scaled_MV[row].masked_fill_(scaled_MV[row] < value, -torch.inf)


def _keep_nuclei(scaled_MV: Tensor, rows: list[int], shares: Sequence[float]) -> None:
    """Leaves out all but the smallest set of the likeliest tokens with at least this share; of
    equally likely ones at its border those with the smaller ids stay."""
    own_MV = _of(scaled_MV, rows)
    wanted_M1 = torch.tensor(shares, dtype=torch.float64, device=scaled_MV.device)[:, None]
    # softmax = exp(scaled) · softmax(top), since the top is 0.
    wanted_M1 = wanted_M1 / torch.softmax(own_MV, 1).amax(1, keepdim=True)
    count_M1 = torch.zeros_like(wanted_M1, dtype=torch.int64)
    least_M1 = torch.empty_like(own_MV[:, :1])
    V = scaled_MV.shape[1]
    open_rows = list(range(len(rows)))
    for width in (*(width for width in _NUCLEI if width < V), V):
        part = _of(own_MV, open_rows)
        best_MK = part.topk(width, 1).values if width < V else part.sort(1, True).values
        count_M1[open_rows], least_M1[open_rows] = _border(best_MK, _of(wanted_M1, open_rows))
        open_rows = [row for row in open_rows if width < V and int(count_M1[row]) == width]
        if not open_rows:
            break
    room = (count_M1 - (own_MV > least_M1).sum(1, keepdim=True))[:, 0].tolist()
    _keep_from(scaled_MV, rows, least_M1)
    ties = (own_MV == least_M1).sum(1).tolist()
    for index, row in enumerate(rows):
        if ties[index] > room[index]:
            places = (scaled_MV[row] == least_M1[index]).nonzero()[:, 0]
            scaled_MV[row, places[room[index] :]] = -torch.inf


def _border(best_MK: Tensor, wanted_M1: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the sorted tokens it takes, and the last one's value."""
    powers_MK = torch.exp(best_MK).double()
    before_MK = powers_MK.cumsum(1) - powers_MK
    count_M1 = (before_MK < wanted_M1).sum(1, keepdim=True).clamp_min(1)
    return count_M1, best_MK.gather(1, count_M1 - 1)


def _likeliest(
    below_MV: Tensor, best_M: Tensor, counts: Sequence[int]
) -> tuple[list[list[int]], list[list[float]]]:
    asking = [row for row, count in enumerate(counts) if count]
    tokens: list[list[int]] = [[] for _ in counts]
    logprobs: list[list[float]] = [[] for _ in counts]
    if asking:
        width = min(max(counts), below_MV.shape[1])
        best = _of(below_MV, asking).topk(width, 1)
        found = best.values.double() + best_M[asking, None]
        for row, own_tokens, own_logprobs in zip(
            asking, best.indices.tolist(), found.tolist(), strict=True
        ):
            tokens[row] = own_tokens[: counts[row]]
            logprobs[row] = own_logprobs[: counts[row]]
    return tokens, logprobs
