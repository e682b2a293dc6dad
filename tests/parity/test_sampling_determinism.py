"""A deterministic run's samples have the same bits whatever else the worker does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from parity.sampled import request_for, token_prompts
from parity.scarce_memory import fault_at
from parity.tiny_runs import perturb, request_of, rows_of, settings, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel, freeze
from workers.engine.engine import TorchBackend
from workers.operations import ArtifactWeights, Completion, SampleRequest, StepRequest, Stop

PROMPTS = token_prompts(5, 31, 9, 18, 1)
STOPS = Stop(tokens=tuple(range(3, 9)))


def base(dtype: torch.dtype) -> BaseModel:
    return freeze("tiny", tiny_llama().to(dtype))


BASES = {"float32": base(torch.float32), "bfloat16": base(torch.bfloat16)}


@pytest.fixture(params=BASES)
def dtype(request) -> str:
    return request.param


def opened(dtype: str, *, deterministic: bool = True, **options) -> TorchBackend:
    """The run, and others beside it."""
    backend = TorchBackend([BASES[dtype]], **options)
    for index, (name, rank) in enumerate({"run": 6, "other": 3, "third": 16}.items()):
        own = settings(lora={"rank": rank}, deterministic=deterministic and name == "run")
        backend.open_run(name, own, None)
        perturb(backend, name, seed=index)
    return backend


def asked(count: int = 5, num_samples: int = 4) -> SampleRequest:
    return request_for(
        PROMPTS[:count], "run", num_samples=num_samples, seed=3, stop=STOPS, temperature=0.8,
        top_p=0.95, max_tokens=15, top_logprobs=3, prompt_logprobs=True,
    )  # fmt: skip


def digest(completion: Completion) -> str:
    """Of every bit of it."""
    found = hashlib.sha256()
    for array in (
        completion.tokens,
        completion.logprobs,
        completion.raw_logprobs,
        completion.top_tokens,
        completion.top_logprobs,
        completion.prompt_logprobs,
    ):
        found.update(array.tobytes())
    return found.hexdigest()


@cache
def alone(dtype: str) -> list[str]:
    return [digest(one) for one in opened(dtype).sample(1, asked()).completions]


def finish(backend: TorchBackend, name: str = "own") -> list[str]:
    """The digests of one operation among those that run."""
    while True:
        backend.sampler.step()
        for ended, outcome in backend.sampler.collect():
            if ended == name:
                assert not isinstance(outcome, Exception), outcome
                return [digest(one) for one in outcome.completions]


def test_rows_end_at_different_tokens(dtype):
    """Else the tests below would say little about rows that end beside others."""
    outcome = opened(dtype).sample(1, asked())
    assert len({len(one.tokens) for one in outcome.completions}) > 4
    assert len(set(alone(dtype))) == 20


@pytest.mark.parametrize("before", [0, 1, 6])
def test_with_others_beside_it(dtype, before):
    expected = alone(dtype)
    backend = opened(dtype)
    sampler = backend.sampler
    for name in ("other", "third"):
        sampler.submit(name, 1, request_for(PROMPTS, name, num_samples=2, max_tokens=9))
    for _ in range(before):
        sampler.step()
    sampler.submit("own", 1, asked())
    sampler.submit("late", 1, request_for(PROMPTS[:1], max_tokens=20))
    assert finish(backend) == expected


def test_with_other_samples_of_its_own_and_training_in_between(dtype):
    expected = alone(dtype)
    backend = opened(dtype)
    sampler = backend.sampler
    sampler.submit("first", 1, asked(3, 7))
    sampler.submit("own", 2, asked())
    sampler.step()
    backend.forward_backward("other", 1, request_of(rows_of(2, [30, 4])))
    backend.optim_step("other", StepRequest(learning_rate=0.1))
    sampler.step()
    backend.forward_backward("run", 1, request_of(rows_of(2, [30, 4])))
    backend.optim_step("run", StepRequest(learning_rate=0.1))
    assert finish(backend) == expected


def test_a_row_does_not_depend_on_those_of_its_own_operation(dtype):
    """Fewer prompts or samples, so that its tile is filled with other rows, or none."""
    expected = alone(dtype)
    for count, num_samples in ((1, 4), (2, 4), (4, 4)):
        outcome = opened(dtype).sample(1, asked(count, num_samples))
        assert [digest(one) for one in outcome.completions] == expected[: 4 * count]
    (one,) = opened(dtype).sample(1, asked(1, 1)).completions
    assert digest(one) == expected[0]


def test_with_less_room_for_rows_and_prompts(dtype):
    expected = alone(dtype)
    backend = opened(dtype, sample_bytes=2**20)
    decoder = backend.sampler._decoders["tiny"]
    decoder._most_rows, decoder._prompt_tokens = 1, 1
    backend.sampler.submit("other", 1, request_for(PROMPTS, "other"))
    backend.sampler.submit("own", 1, asked())
    assert finish(backend) == expected


def test_from_an_artifact_of_the_run(dtype, tmp_path):
    expected = alone(dtype)
    backend = opened(dtype)
    backend.save_state("run", tmp_path, include_optimizer=False)
    request = asked()
    request.run_id, request.artifact = None, ArtifactWeights("art-1", tmp_path)
    backend.sampler.submit("other", 1, request_for(PROMPTS, "other"))
    backend.sampler.submit("own", "op-1", request)
    assert finish(backend) == expected


def test_in_another_process():
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *sys.path])
    code = "from parity.test_sampling_determinism import BASES, alone; "
    code += "print(*[each for dtype in BASES for each in alone(dtype)])"
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1); " + code],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [each for dtype in BASES for each in alone(dtype)]


def test_when_there_is_no_memory_for_a_tile_it_says_so(dtype):
    backend = opened(dtype)
    with (
        fault_at(BASES[dtype].body, set(range(99)), backward=False),
        pytest.raises(TenSafeFault, match="deterministic") as caught,
    ):
        backend.sample(1, asked())
    assert caught.value.detail.reason == "OUT_OF_MEMORY"
    assert [digest(one) for one in backend.sample(1, asked()).completions] == alone(dtype)


def test_without_it_company_changes_bits():
    """What the setting is for; if this fails, the tests above cannot. In bfloat16 some machines'
    products have the same bits in any company."""
    lone = opened("float32", deterministic=False).sample(1, asked()).completions
    backend = opened("float32", deterministic=False)
    backend.sampler.submit("other", 1, request_for(PROMPTS, "other", num_samples=3))
    backend.sampler.submit("own", 1, asked())
    assert finish(backend) != [digest(one) for one in lone]
