"""The audit finds nothing in the engine, and finds what is put there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.tiny_runs import rows_of
from privacy.audit import RELEASES, audit
from transformers import LlamaConfig, LlamaForCausalLM

from workers.engine.base_model import BaseModel, freeze
from workers.engine.privacy import calls, runs

SIGMA, BOUND = 0.5, 1e-2
SHORT = 2_000


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 96}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=16, initializer_range=0.5)
    return freeze("tiny", LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def canary() -> np.ndarray:
    """One whose gradient is clipped."""
    return rows_of(3, [3])[0]


def scale_noise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    noise = runs.PrivateRun._noise
    monkeypatch.setattr(runs.PrivateRun, "_noise", lambda run, step: factor * noise(run, step))


def double_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = calls.clip_factors
    monkeypatch.setattr(calls, "clip_factors", lambda norms, bound: clip(norms, 2 * bound))


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("releases", [SHORT, pytest.param(RELEASES, marks=pytest.mark.slow)])
def test_the_engine_keeps_its_claim(base, canary, releases, windows):
    found = audit(base, canary, sigma=SIGMA, bound=BOUND, releases=releases, calls=windows)
    assert not found.alarms
    # The canary is clipped, so that the audit is as sharp as it can be.
    assert abs(found.z) < 4


@pytest.mark.parametrize("releases", [SHORT, pytest.param(RELEASES, marks=pytest.mark.slow)])
def test_halved_noise_is_found(base, canary, releases, monkeypatch):
    scale_noise(monkeypatch, 0.5)
    assert audit(base, canary, sigma=SIGMA, bound=BOUND, releases=releases).alarms


@pytest.mark.parametrize("releases", [SHORT, pytest.param(RELEASES, marks=pytest.mark.slow)])
def test_doubled_sensitivity_is_found(base, canary, releases, monkeypatch):
    double_bound(monkeypatch)
    assert audit(base, canary, sigma=SIGMA, bound=BOUND, releases=releases).alarms


@pytest.mark.slow
def test_a_tenth_too_little_noise_is_found(base, canary, monkeypatch):
    scale_noise(monkeypatch, 0.9)
    assert audit(base, canary, sigma=SIGMA, bound=BOUND).alarms
