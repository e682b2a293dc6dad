"""The engine on a GPU: against the CPU, against plain `peft`, and against itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.gpu_models import DEVICE, MIDDLE, distance, middle, tiny
from parity.group_members import Member, entries
from parity.peft_reference import PlainPeft
from parity.tiny_runs import TARGETS, hf_batch, metric, request_of, rows_of, settings, tiny_llama

from workers.engine.base_model import BaseModel
from workers.engine.engine import TorchBackend
from workers.engine.graphs import graphs as sizes
from workers.operations import (
    LossOutcome,
    Prompt,
    Reduction,
    SampleRequest,
    SamplingParams,
    StepRequest,
    Stop,
)

LENGTHS = (60, 33, 17, 5)


def opened(base: BaseModel, *, captures: bool = False, **options) -> TorchBackend:
    """With one run whose adapter is not zero."""
    backend = TorchBackend([base], captures=captures)
    backend.open_run("run", settings(**options), None)
    nudge(backend, "run")
    return backend


def nudge(backend: TorchBackend, run: str, seed: int = 1) -> None:
    weights = backend._runs[run].adapter.weights
    with torch.no_grad():
        drawn = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
        weights += 0.05 * drawn.to(weights)


def train(backend: TorchBackend, seed: int, run: str = "run"):
    """One call and its update: outcome, and gradient."""
    request = request_of(rows_of(seed, list(LENGTHS)))
    outcome = backend.forward_backward(run, 1, request)
    gradient = backend._runs[run].accumulator.clone()
    backend.optim_step(run, StepRequest())
    return outcome, gradient


def test_float32_is_the_cpus():
    """With dropout, whose masks are the same everywhere."""
    lora = {"dropout": 0.2}
    ours, theirs = opened(tiny(), lora=lora), opened(tiny("cpu"), lora=lora)
    for seed in range(4):
        (found, gradient), (expected, reference) = (train(one, seed) for one in (ours, theirs))
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        assert distance(gradient, reference) < 1e-4
    found, expected = (one._runs["run"].adapter.weights for one in (ours, theirs))
    assert distance(found, expected) < 1e-3


def test_bfloat16_is_no_further_from_float32_than_plain_peft():
    errors: dict[str, list[float]] = {"ours": [], "peft": []}
    for seed in range(4):
        rows = rows_of(seed, list(LENGTHS))
        exact = opened(middle(torch.float32))
        expected, gradient = train(exact, seed)
        reference = exact._runs["run"].adapter.named(gradient / expected_divisor(rows))
        ours, own = train(opened(middle()), seed)
        run = opened(middle())._runs["run"]
        plain = PlainPeft(tiny_llama(**MIDDLE).to(DEVICE, torch.bfloat16), run)
        batch = {name: value.to(DEVICE) for name, value in hf_batch(rows).items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=False):
            plain.model(**batch).loss.backward()
        found = run.adapter.named(own / expected_divisor(rows))
        for name, parameter in plain.named().items():
            errors["ours"].append(distance(found[name], reference[name]))
            errors["peft"].append(distance(parameter.grad, reference[name]))
        assert np.abs(ours.logprobs - expected.logprobs).mean() < 0.05
    assert sum(errors["ours"]) <= 1.25 * sum(errors["peft"])


def expected_divisor(rows) -> int:
    """Scored positions: all but the first of each row."""
    return sum(len(row) - 2 for row in rows)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_captured_passes_compute_what_they_do_as_written(dropout):
    lora = {"dropout": dropout, "rank": 8}
    ours, theirs = (opened(middle(), captures=own, lora=lora) for own in (True, False))
    for seed in range(6):
        (found, gradient), (expected, reference) = (train(one, seed) for one in (ours, theirs))
        assert np.abs(found.logprobs - expected.logprobs).mean() < 0.02
        assert distance(gradient, reference) < 0.05
    graphs = ours.base_model("tiny").graphs
    assert len(graphs.held) == 1
    graphs.release()
    train(ours, 9)


MEMBERS = [
    Member(
        seed,
        {"rank": rank, "alpha": 16.0, "dropout": dropout, "target_modules": targets},
        {},
        Reduction.TOKEN_MEAN,
        lengths,
        1.0,
    )
    for seed, (rank, dropout, targets, lengths) in enumerate(
        [
            (1, 0.0, TARGETS, (40, 11)),
            (64, 0.3, ("q_proj", "v_proj"), (64,)),
            (16, 0.0, ("down_proj",), (9, 9, 1)),
            (8, 0.1, TARGETS, (33,)),
            (12, 0.0, ("gate_proj", "k_proj"), (17, 5)),
        ]
    )
]


def open_members(captures: bool) -> TorchBackend:
    backend = TorchBackend([middle()], captures=captures)
    for index, member in enumerate(MEMBERS):
        options = settings(seed=member.seed, lora=member.lora, optimizer=member.optimizer)
        backend.open_run(str(index), options, None)
        nudge(backend, str(index), member.seed)
    return backend


@pytest.mark.parametrize("captures", [False, True])
def test_runs_together_are_each_alone(captures):
    together, alone = open_members(captures), open_members(False)
    for call in range(5):
        outcomes = together.forward_backward_group(entries(MEMBERS, call=call))
        for index, outcome in enumerate(outcomes):
            assert isinstance(outcome, LossOutcome)
            run, seq, request = entries(MEMBERS, [index], call)[0]
            own = alone.forward_backward(run, seq, request)
            assert np.abs(outcome.logprobs - own.logprobs).mean() < 0.02
            ours, theirs = (one._runs[run].accumulator for one in (together, alone))
            assert distance(ours, theirs) < 0.05
        # No update: the gradients of later calls are added to.
        for backend in (together, alone):
            for index in range(len(MEMBERS)):
                backend.drop_window(str(index))


def test_deterministic_runs_have_the_same_bits_whoever_is_there():
    def bits(neighbours: int, captured: bool = True) -> list[bytes]:
        backend = opened(middle(), captures=True, deterministic=True, lora={"dropout": 0.1})
        graphs = backend.base_model("tiny").graphs
        if not captured:
            graphs._most_tokens = 0
        for index in range(neighbours):
            backend.open_run(f"other-{index}", settings(seed=index), None)
        found = []
        for seed in range(4):
            for index in range(neighbours):
                train(backend, 10 + index, f"other-{index}")
            outcome, gradient = train(backend, seed)
            found += [outcome.logprobs.tobytes(), gradient.cpu().numpy().tobytes()]
        assert any(size.exact for size in graphs.held) is captured
        return [*found, backend._runs["run"].adapter.weights.detach().cpu().numpy().tobytes()]

    assert bits(0) == bits(0) == bits(3) == bits(2, captured=False)


def test_deterministic_runs_have_the_same_bits_after_a_restart():
    command = [sys.executable, "-m", "gpu.deterministic_digest"]
    places = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    found = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": places},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(found[0].split()) == 4


def test_too_large_a_batch_is_split_and_counts_nothing_twice():
    """The memory really ends: the process may take a little more than the model."""
    rows = rows_of(1, [200] * 24)
    request = request_of(rows)
    exact = opened(middle())
    exact.forward_backward("run", 1, request)
    expected = exact._runs["run"].accumulator.clone()
    # Measured before: as if the rest had been taken by others since.
    backend = opened(middle(), captures=True)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.memory_reserved() + 60 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        for _ in range(4):
            outcome = backend.forward_backward("run", 1, request)
            assert isinstance(outcome, LossOutcome)
            found = backend._runs["run"].accumulator.clone()
            assert distance(found, expected) < 0.05
            backend.drop_window("run")
        assert backend._budgets["tiny"].tokens < len(request.batch.input_tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_state_goes_from_gpu_to_cpu_and_back(tmp_path: Path):
    ours = opened(tiny())
    train(ours, 1)
    ours.save_state("run", tmp_path, True)
    theirs = TorchBackend([tiny("cpu")])
    theirs.open_run("run", settings(), tmp_path)
    again = TorchBackend([tiny()])
    again.open_run("run", settings(), tmp_path)
    train(ours, 2)
    for one in (theirs, again):
        train(one, 2)
        found, expected = (b._runs["run"].adapter.weights for b in (one, ours))
        assert distance(found, expected) < 1e-4


def test_updates_together_are_each_alone():
    together, alone = (open_members(False) for _ in range(2))
    names = [str(index) for index in range(len(MEMBERS))]
    for backend in (together, alone):
        backend.forward_backward_group(entries(MEMBERS))
    applied = together.optim_step_group([(name, StepRequest()) for name in names])
    for name, outcome in zip(names, applied, strict=True):
        own = alone.optim_step(name, StepRequest())
        assert outcome.applied
        assert outcome.grad_norm == pytest.approx(own.grad_norm, rel=0.05)
        found, expected = (b._runs[name].adapter.weights for b in (together, alone))
        assert distance(found, expected) < 0.05


def test_the_likeliest_tokens_are_the_cpus():
    prompts = [Prompt(tokens=row[:-1]) for row in rows_of(6, [3, 11, 7])]
    params = SamplingParams(temperature=0, max_tokens=10, stop=Stop())
    request = SampleRequest(prompts, params, model_ref="tiny")
    found, expected = (
        TorchBackend([base]).sample("op", request).completions for base in (tiny(), tiny("cpu"))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3)


def test_samples_in_bfloat16_agree_with_forward():
    backend = opened(middle())
    prompts = [Prompt(tokens=row[:-1]) for row in rows_of(6, [30, 11, 7])]
    params = SamplingParams(max_tokens=24, stop=Stop(), seed=3)
    sampled = backend.sample("op", SampleRequest(prompts, params, run_id="run")).completions
    gaps = []
    for prompt, completion in zip(prompts, sampled, strict=True):
        row = np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32)
        outcome = backend.forward("run", request_of([row], masked=len(prompt.tokens) - 1))
        gaps.append(np.abs(outcome.logprobs[len(prompt.tokens) - 1 :] - completion.logprobs))
    assert np.concatenate(gaps).mean() < 0.02


def test_a_loss_of_many_positions_is_finite_and_falls():
    assert sizes._WORTH < 10
    backend = opened(middle(), captures=True, lora={"dropout": 0.05, "rank": 16})
    losses = [metric(train(backend, 1)[0], "loss") for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
