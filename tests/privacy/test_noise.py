"""Noise is Gaussian of the asked-for scale, fresh at each step, and nobody's seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from parity.tiny_runs import settings
from privacy.private_runs import SGD, exact_model, privacy, private
from scipy import stats

from workers.engine.engine import TorchBackend
from workers.engine.privacy.noise import NoiseThread, fresh_key, seeded_key, standard_normals
from workers.engine.privacy.runs import PrivateRun
from workers.operations import StepRequest

COUNT = 2_400_000
SIGMA, BOUND = 1.7, 0.3
Z = 5.0
"""A fair draw exceeds it once in two million times."""


def releases(runs: int = 1, steps: int = 1, **changes) -> np.ndarray:
    """[runs, steps, COUNT]: what empty windows release, times the expected batch size."""
    thread = NoiseThread()
    own = privacy(noise_multiplier=SIGMA, max_grad_norm=BOUND, expected_batch_size=64.0, **changes)
    found = np.empty((runs, steps, COUNT))
    for run in range(runs):
        state = PrivateRun(own, thread, COUNT, torch.float32)
        for step in range(steps):
            total = torch.zeros(COUNT)
            assert state.privatize(total, step).noise_applied
            found[run, step] = total.double().numpy() * 64.0
    return found


def correlation_z(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.corrcoef(one, two)[0, 1] * math.sqrt(len(one)))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return releases(runs=2, steps=2)


def test_its_distribution_is_normal(drawn):
    for sample in drawn.reshape(4, -1):
        assert stats.kstest(sample, "norm", args=(0.0, SIGMA * BOUND)).pvalue > 1e-6


def test_its_variance_is_that_of_the_settings(drawn):
    """0.3% too little would be seen: z = 6.6."""
    for sample in drawn.reshape(4, -1):
        ratio = np.mean(sample**2) / (SIGMA * BOUND) ** 2
        assert abs(ratio - 1) * math.sqrt(COUNT / 2) < Z
        assert abs(sample.mean()) / (SIGMA * BOUND) * math.sqrt(COUNT) < Z
        fourth = np.mean((sample / (SIGMA * BOUND)) ** 4)
        assert abs(fourth - 3) / math.sqrt(96 / COUNT) < Z


def test_its_tails_are_there(drawn):
    """Of 9.6 million draws about 65 lie beyond 4.5 standard deviations, and none beyond 8."""
    distances = np.abs(drawn).ravel() / (SIGMA * BOUND)
    expected = drawn.size * 2 * stats.norm.sf(4.5)
    assert abs((distances > 4.5).sum() - expected) < Z * math.sqrt(expected)
    assert 4.5 < distances.max() < 8.0


@pytest.mark.parametrize(
    ("one", "two"),
    [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0)), ((1, 0), (1, 1))],
    ids=["steps", "tenants", "tenants-and-steps", "steps-of-another"],
)
def test_no_two_releases_are_related(drawn, one, two):
    for relate in (lambda x: x, np.abs):
        assert abs(correlation_z(relate(drawn[one]), relate(drawn[two]))) < Z


@pytest.mark.parametrize("lag", [1, 2, 576, 9216, 2**14, 2**15, COUNT // 2])
def test_no_two_places_of_a_release_are_related(drawn, lag):
    """Neighbours, tensors, and the two halves of the pairs that draws come in."""
    sample = drawn[0, 0]
    for relate in (lambda x: x, np.abs, np.square):
        assert abs(correlation_z(relate(sample[:-lag]), relate(sample[lag:]))) < Z


def noise_of(backend: TorchBackend, run_id: str) -> torch.Tensor:
    """How far an update of an empty window moves the weights, at rate 1, times the divisor."""
    weights = backend._runs[run_id].adapter.weights
    before = weights.detach().clone()
    outcome = backend.optim_step(run_id, StepRequest(charged=True))
    assert outcome.applied
    return 8 * (before - weights.detach())


def test_the_tenants_seed_changes_nothing_of_it():
    backend = TorchBackend([exact_model()], token_budget=100)
    found = []
    for run_id in ("one", "two"):
        torch.manual_seed(7)
        np.random.seed(7)
        options = private(settings(seed=3, optimizer=SGD), noise_multiplier=1.0)
        backend.open_run(run_id, options, None)
        state = torch.get_rng_state()
        found.append(noise_of(backend, run_id))
        assert torch.equal(torch.get_rng_state(), state)
    count = len(found[0])
    assert abs(correlation_z(found[0].numpy(), found[1].numpy())) < Z
    assert (found[0] == found[1]).sum() < count / 100


def test_an_empty_window_is_noised_and_counts():
    backend = TorchBackend([exact_model()], token_budget=100)
    options = private(settings(optimizer=SGD), noise_multiplier=2.0, max_grad_norm=0.5)
    backend.open_run("run", options, None)
    noise = torch.cat([noise_of(backend, "run") for _ in range(20)]).numpy()
    assert backend._runs["run"].window.step == 20
    assert stats.kstest(noise, "norm", args=(0.0, 1.0)).pvalue > 1e-6


def test_a_vector_that_was_drawn_ahead_serves_once():
    backend = TorchBackend([exact_model()], token_budget=100)
    backend.open_run("run", private(settings(optimizer=SGD), noise_multiplier=1.0), None)
    run = backend._runs["run"].private
    run.draw_ahead()
    ahead = run._ahead.result().clone()
    assert run.held_bytes == ahead.nbytes
    torch.testing.assert_close(noise_of(backend, "run"), ahead[:-1], rtol=0, atol=1e-14)
    assert run.held_bytes == 0
    assert abs(correlation_z(noise_of(backend, "run").numpy(), ahead[:-1].numpy())) < Z


def test_keys_are_fresh_and_those_of_tests_are_not():
    assert len({fresh_key() for _ in range(1000)}) == 1000
    assert seeded_key(5, 3) == seeded_key(5, 3)
    assert len({seeded_key(seed, step) for seed in range(30) for step in range(30)}) == 900
    assert {len(fresh_key()), len(seeded_key(1, 1))} == {32}


def test_the_stream_is_chacha20_as_it_is_standardised():
    """RFC 8439, section 2.3.2's block function with a zero nonce: key stream of appendix A.1, test
    vector 1 (all-zero key), through the same transform in NumPy."""
    first = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    first += "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    words = np.frombuffer(bytes.fromhex(first), "<u8")
    normals = standard_normals(bytes(32), 2**15, torch.float64).numpy()
    half = 2**14
    # The radius of a pair comes from the first half of a chunk's words.
    uniform = ((words & np.uint64(2**53 - 1)).astype(np.float64) + 0.5) / 2**53
    radius = np.hypot(normals[: len(words)], normals[half : half + len(words)])
    np.testing.assert_allclose(radius, np.sqrt(-2 * np.log(uniform)), rtol=1e-12)


def test_a_test_seed_gives_the_same_noise_at_the_same_step():
    one, two = (releases(steps=2, test_seed=11)[0] for _ in range(2))
    other = releases(steps=1, test_seed=12)[0]
    np.testing.assert_array_equal(one, two)
    assert abs(correlation_z(one[0], one[1])) < Z
    assert abs(correlation_z(one[0], other[0])) < Z
