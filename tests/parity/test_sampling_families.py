"""Decoding token by token equals `forward`, and `transformers.generate`, family by family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.sampled import forward_logprobs, request_for, sample, sample_together, token_prompts
from parity.tiny_models import CONTEXT, FAMILIES, Family, Wide
from parity.tiny_runs import perturb, settings

from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.engine.packing import pack
from workers.engine.sampling.cache import KeyValueCache
from workers.engine.sampling.decoding import Decoding
from workers.operations import Prompt

EXACT = 1e-9
FLOAT32 = 1e-6
"""Completions are float32 whatever the model is."""
LONGEST = {"phi3-longrope": 32}


@pytest.fixture(params=FAMILIES, ids=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def family(name) -> Family:
    return FAMILIES[name]


def opened(family: Family, runs: dict[str, int]) -> TorchBackend:
    """Runs of these ranks, each with other weights."""
    backend = TorchBackend([freeze("tiny", family.build())])
    for index, (name, rank) in enumerate(runs.items()):
        lora = {"rank": rank, "alpha": 7.0, "target_modules": family.linear}
        backend.open_run(name, settings(lora=lora), None)
        perturb(backend, name, seed=index)
    return backend


@torch.no_grad()
def test_hidden_states_of_ragged_rows_are_those_of_one_pass(family, name):
    """Rows of several lengths, in two pools, some beyond the sliding windows."""
    limit = LONGEST.get(name, CONTEXT)
    with Wide():
        model = freeze("tiny", family.build())
        lengths, known = [limit, limit // 2, 9, limit - 3], [limit - 7, 2, 8, 1]
        rng = np.random.default_rng(0)
        rows = [torch.from_numpy(rng.integers(3, 96, length)) for length in lengths]
        expected = [
            model.hidden(row, torch.arange(len(row)), pack([len(row)], "cpu")) for row in rows
        ]
        cache: KeyValueCache[int] = KeyValueCache(model.layer_shapes, model.dtype, "cpu", 2**40)
        for index, (row, count, room) in enumerate(zip(rows, known, [40, 100, 9, 40], strict=True)):
            place = cache.take(room, index)
            layout = pack([count], "cpu")
            layout.keep = place.write
            model.hidden(row[:count], torch.arange(count), layout)
            place.length = count
        while going := [place for pool in cache.pools.values() for place in pool.places]:
            ids = torch.stack([rows[place.owner][place.length] for place in going])
            positions = torch.tensor([place.length for place in going])
            hidden = model.hidden(ids, positions, Decoding(going, "cpu"))
            for own, place in zip(hidden, going, strict=True):
                due = expected[place.owner][place.length]
                torch.testing.assert_close(own, due, rtol=0, atol=EXACT)
                place.length += 1
            for place in going:
                if place.length == lengths[place.owner]:
                    cache.release(place)


def test_sampled_logprobs_are_those_of_forward(family, name):
    """For tenants with ranks of their own, and the base model, all in one batch."""
    longest = LONGEST.get(name, CONTEXT)
    with Wide():
        backend = opened(family, {"a": 3, "b": 5})
        prompts = token_prompts(5, longest - 20, 1)
        requests = {
            run or "base": request_for(prompts, run, num_samples=2, max_tokens=16)
            for run in ("a", "b", None)
        }
        outcomes = sample_together(backend, requests, later=2)
        tokens = set()
        for run in ("a", "b"):
            completions = outcomes[run].completions
            expected = forward_logprobs(backend, run, prompts, completions)
            for completion, own in zip(completions, expected, strict=True):
                np.testing.assert_allclose(completion.raw_logprobs, own, rtol=0, atol=FLOAT32)
                np.testing.assert_allclose(completion.logprobs, own, rtol=0, atol=FLOAT32)
                tokens.add(completion.tokens.tobytes())
        assert len(tokens) == 12  # no two of them are the same text
        alone = sample(backend, prompts, num_samples=2, max_tokens=16)
        for ours, own in zip(outcomes["base"].completions, alone, strict=True):
            assert ours.tokens.tolist() == own.tokens.tolist()


def test_the_likeliest_tokens_are_those_of_generate(family, name):
    longest = LONGEST.get(name, CONTEXT)
    with Wide():
        backend = opened(family, {"run": 3})
        plain = PlainPeft(family.build(), backend._runs["run"])
        prompts = token_prompts(7, longest - 12)
        ours = sample(backend, prompts, "run", temperature=0)
        bases = sample(backend, prompts, temperature=0)
        for prompt, tuned, base in zip(prompts, ours, bases, strict=True):
            for completion, model in ((tuned, plain.model), (base, family.build())):
                ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
                theirs = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=12,
                    do_sample=False,
                    eos_token_id=None,
                )
                assert completion.tokens.tolist() == theirs[0, ids.shape[1] :].tolist()
            assert not np.allclose(tuned.raw_logprobs, base.raw_logprobs, atol=1e-3)


def test_prompt_logprobs_are_those_of_forward(family, name):
    longest = LONGEST.get(name, CONTEXT)
    with Wide():
        backend = opened(family, {"run": 3})
        whole = token_prompts(longest - 2, 20, 1)
        ours = sample(backend, whole, "run", max_tokens=1, num_samples=2, prompt_logprobs=True)
        for completion in ours:
            tokens = whole[completion.prompt_index].tokens
            assert len(completion.prompt_logprobs) == len(tokens)
            assert np.isnan(completion.prompt_logprobs[0])
        for completion, prompt in zip(ours[::2], whole[:2], strict=False):
            first = [Prompt(tokens=prompt.tokens[:1])]
            rest = replace(completion, prompt_index=0, tokens=prompt.tokens[1:])
            (expected,) = forward_logprobs(backend, "run", first, [rest])
            np.testing.assert_allclose(
                completion.prompt_logprobs[1:], expected, rtol=0, atol=FLOAT32
            )
