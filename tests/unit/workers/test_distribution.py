"""What sampling options leave of a distribution, against NumPy and `transformers`' processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.engine.sampling.distribution import Workspace, draw
from workers.operations import SamplingParams

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.5, "min_p": 0.3},
]


def shaped(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities [V] in float64, written down from the definitions."""
    scaled = (logits - logits.max()) / params.temperature
    kept = np.ones(len(scaled), bool)
    if params.top_k:
        kept &= scaled >= np.sort(scaled)[::-1][: params.top_k][-1]
    if params.top_p < 1:
        shares = np.where(kept, np.exp(scaled), 0)
        shares /= shares.sum()
        order = np.argsort(-shares, kind="stable")
        before = np.cumsum(shares[order]) - shares[order]
        nucleus = np.zeros(len(scaled), bool)
        nucleus[order] = before < params.top_p
        kept &= nucleus
    if params.min_p:
        kept &= np.exp(scaled) >= params.min_p
    shares = np.where(kept, np.exp(scaled), 0)
    return shares / shares.sum()


def logits_of(seed: int, size: int, spread: float = 3.0, *, coarse: bool = False) -> np.ndarray:
    """Random logits; coarse ones have many ties, as those of a bfloat16 head."""
    logits = np.random.default_rng(seed).normal(0, spread, size)
    return np.round(logits * 2) / 2 if coarse else logits


def drawn(rows: list[np.ndarray], params: list[SamplingParams], points: list[float]) -> Any:
    logits = torch.from_numpy(np.stack(rows))
    return draw(logits, params, points, Workspace())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [5, 256, 1000, 5000])
@pytest.mark.parametrize("coarse", [False, True])
def test_draws_and_logprobs_are_those_of_the_definition(options, size, coarse):
    params = SamplingParams(**options)
    logits = logits_of(size, size, coarse=coarse)
    expected = shaped(logits, params)
    ends = np.cumsum(expected)
    points = np.random.default_rng(1).random(400).tolist()
    found = drawn([logits] * 400, [params] * 400, points)
    raw = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    for point, token, logprob, raw_logprob in zip(
        points, found.tokens, found.logprobs, found.raw_logprobs, strict=True
    ):
        # The token whose stretch of the cumulative distribution has the point in it.
        assert ends[token] - expected[token] - 1e-9 <= point <= ends[token] + 1e-9
        assert expected[token] > 0
        assert logprob == pytest.approx(np.log(expected[token]), abs=1e-9)
        assert raw_logprob == pytest.approx(raw[token], abs=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_support_is_that_of_transformers(options):
    params = SamplingParams(**options)
    logits = logits_of(9, 3000)
    processors = LogitsProcessorList(
        [
            TemperatureLogitsWarper(params.temperature),
            *([TopKLogitsWarper(min(params.top_k, 3000))] if params.top_k else []),
            *([TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []),
            *([MinPLogitsWarper(params.min_p)] if params.min_p else []),
        ]
    )
    theirs = processors(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(logits)[None])
    expected = torch.softmax(theirs[0], 0).numpy()
    # A point in the middle of each token's stretch draws that token, and so all of them.
    ends = np.cumsum(expected)
    points = (ends - expected / 2)[expected > 0]
    found = drawn([logits] * len(points), [params] * len(points), points.tolist())
    assert found.tokens == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(np.exp(found.logprobs), expected[expected > 0], rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0, 1e-40, 0.3, 1.0, 1.7]),
            top_k=st.sampled_from([0, 1, 3, 400]),
            top_p=st.sampled_from([1.0, 0.9, 0.2]),
            min_p=st.sampled_from([0.0, 0.1]),
            top_logprobs=st.sampled_from([0, 2, 5]),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_a_row_is_what_it_is_alone(seed, rows):
    """Whatever the options of the rows beside it; here even to the bit."""
    generator = np.random.default_rng(seed)
    logits = [logits_of(int(generator.integers(2**31)), 700) for _ in rows]
    points = generator.random(len(rows)).tolist()
    together = drawn(logits, rows, points)
    for index, params in enumerate(rows):
        alone = drawn([logits[index]], [params], [points[index]])
        for name in ("tokens", "logprobs", "raw_logprobs", "top_tokens", "top_logprobs"):
            assert getattr(alone, name)[0] == getattr(together, name)[index], name


@pytest.mark.parametrize("point", [0.0, 5e-324, 1 - 2**-53])
@pytest.mark.parametrize("size", [3, 256, 257, 1024])
def test_a_token_without_probability_is_never_drawn(point, size):
    """Not even at the ends, where rounding could go past what there is."""
    logits = np.full(size, -np.inf)
    logits[size // 2] = 0.0
    logits[size // 2 + 1] = 0.1
    found = drawn([logits, logits], [SamplingParams(), SamplingParams(top_k=1)], [point, point])
    assert found.tokens[0] == size // 2 + (point > 0.5)
    assert found.tokens[1] == size // 2 + 1
    assert found.logprobs[1] == 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-40])
def test_a_tiny_temperature_takes_extreme_logits(temperature):
    logits = torch.tensor([[3e38, -3e38, 0.0, -torch.inf], [-1.0, -1.5, -2.0, -3.0]])
    params = [SamplingParams(temperature=temperature)] * 2
    found = draw(logits, params, [0.5, 0.999], Workspace())
    assert found.tokens == found.logprobs == [0, 0]


def test_a_row_of_nan_is_told_and_stays_by_itself():
    logits = [np.full(300, np.nan), logits_of(1, 300), logits_of(2, 300)]
    logits[2][5] = np.inf
    for options in OPTIONS:
        params = [SamplingParams(**options)] * 3
        found = drawn(logits, params, [0.3, 0.4, 0.5])
        alone = drawn(logits[1:2], params[:1], [0.4])
        assert np.isnan(found.raw_logprobs[0])
        assert np.isnan(found.raw_logprobs[2])
        assert found.raw_logprobs[1] == alone.raw_logprobs[0]
        assert found.tokens[1] == alone.tokens[0]


def test_the_likeliest_tokens_are_those_of_the_models_own_logits():
    logits = logits_of(4, 500)
    params = [SamplingParams(top_logprobs=4, temperature=0.1, top_k=2), SamplingParams()]
    found = drawn([logits, logits], params, [0.2, 0.7])
    order = np.argsort(-logits)[:4]
    raw = logits - np.log(np.exp(logits).sum())
    assert found.top_tokens == [order.tolist(), []]
    np.testing.assert_allclose(found.top_logprobs[0], raw[order], rtol=1e-12)


def test_more_likeliest_tokens_than_there_are_are_all():
    found = drawn([logits_of(4, 3)], [SamplingParams(top_logprobs=20)], [0.5])
    assert sorted(found.top_tokens[0]) == [0, 1, 2]


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_a_nucleus_is_found_however_flat_the_distribution(spread):
    """From one token to nearly all of more than are looked at first."""
    logits = logits_of(3, 6000, spread)
    params = SamplingParams(top_p=0.97)
    expected = shaped(logits, params)
    for point in (0.0001, 0.3, 0.9999):
        (token,) = drawn([logits], [params], [point]).tokens
        end = np.cumsum(expected)[token]
        assert end - expected[token] - 1e-9 <= point <= end + 1e-9


@pytest.mark.parametrize("point", [0.0, 0.25, 0.75, 0.999])
def test_a_nucleus_whose_share_is_reached_exactly_takes_nothing_more(point):
    found = drawn([np.zeros(4)], [SamplingParams(top_p=0.5)], [point])
    assert found.tokens == [int(point >= 0.5)]
    assert found.logprobs == [pytest.approx(np.log(0.5))]
