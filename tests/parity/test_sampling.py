"""Generation against `transformers`' own, and what a completion must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.tiny_runs import request_of, rows_of, settings, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.engine import TorchBackend
from workers.engine.sampling import pick
from workers.operations import (
    ArtifactWeights,
    ChatMessage,
    Prompt,
    SampleRequest,
    SamplingParams,
    StepRequest,
    Stop,
)


def token_prompts(*lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(6)
    return [Prompt(tokens=rng.integers(3, 96, n).astype(np.int32)) for n in lengths]


def base_sample(backend: TorchBackend, prompts: list[Prompt], **params):
    request = SampleRequest(prompts, SamplingParams(**params), model_ref="tiny")
    return backend.sample("op-1", request).completions


@pytest.fixture
def backend(base) -> TorchBackend:
    return TorchBackend([base])


def test_greedy_is_generate_whatever_the_padding(backend):
    prompts = token_prompts(3, 11, 7)
    ours = base_sample(backend, prompts, temperature=0, max_tokens=10, stop=Stop())
    model = tiny_llama()
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.from_numpy(prompt.tokens.astype("int64"))[None]
        theirs = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert completion.tokens.tolist() == theirs[0, ids.shape[1] :].tolist()
        assert not completion.stopped
        assert completion.prompt_tokens == ids.shape[1]


def test_draws_do_not_depend_on_company(backend):
    prompts = token_prompts(5, 9, 6)
    together = base_sample(backend, prompts, max_tokens=12, num_samples=3, seed=4)
    assert [(c.prompt_index) for c in together] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    again = base_sample(backend, prompts, max_tokens=12, num_samples=3, seed=4)
    other = base_sample(backend, prompts, max_tokens=12, num_samples=3, seed=5)
    fewer = base_sample(backend, prompts[:1], max_tokens=12, num_samples=2, seed=4)
    tokens = [c.tokens.tolist() for c in together]
    assert [c.tokens.tolist() for c in again] == tokens
    assert [c.tokens.tolist() for c in other] != tokens
    assert [c.tokens.tolist() for c in fewer] == tokens[:2]
    assert tokens[0] != tokens[1]
    same = base_sample(backend, [prompts[0], prompts[0]], max_tokens=12, seed=4)
    assert same[0].tokens.tolist() != same[1].tokens.tolist()


def test_end_tokens_and_stop_tokens(backend):
    prompt = token_prompts(5)
    free = base_sample(backend, prompt, temperature=0, max_tokens=12, stop=Stop())[0]
    assert len(free.tokens) == 12
    third = int(free.tokens[2])
    first = free.tokens.tolist().index(third)
    stopped = base_sample(backend, prompt, temperature=0, max_tokens=12, stop=Stop(tokens=(third,)))
    assert stopped[0].tokens.tolist() == free.tokens[:first].tolist()
    assert stopped[0].stopped
    assert len(stopped[0].logprobs) == first
    model = next(iter(backend._models.values()))
    model.end_tokens = frozenset({third})
    assert base_sample(backend, prompt, temperature=0, max_tokens=12)[0].stopped
    assert not base_sample(backend, prompt, temperature=0, max_tokens=12, stop=Stop())[0].stopped


def test_the_context_ends_a_completion(backend):
    long = base_sample(backend, token_prompts(60), max_tokens=50, stop=Stop())[0]
    assert len(long.tokens) == 4
    assert not long.stopped
    with pytest.raises(TenSafeFault, match="context of 64"):
        base_sample(backend, token_prompts(64))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(tokens=np.asarray([5, 96], np.int32)), "TOKEN_OUT_OF_RANGE"),
        (Prompt(tokens=np.asarray([], np.int32)), "INVALID_ARGUMENT"),
        (Prompt(text="hello"), "INVALID_ARGUMENT"),
        (Prompt(chat=(ChatMessage("user", "hi"),)), "NO_CHAT_TEMPLATE"),
    ],
)
def test_bad_prompts(backend, prompt, reason):
    with pytest.raises(TenSafeFault) as caught:
        base_sample(backend, [prompt])
    assert caught.value.detail.reason == reason


def test_weights_current_artifact_and_base(backend, tmp_path):
    backend.open_run("run", settings(), None)
    prompts = token_prompts(5, 8)
    params = SamplingParams(temperature=0, max_tokens=12, stop=Stop())

    def tokens(**weights):
        outcome = backend.sample(1, SampleRequest(prompts, params, **weights))
        return [c.tokens.tolist() for c in outcome.completions], outcome.model_step

    base, step = tokens(model_ref="tiny")
    assert step == 0
    assert tokens(run_id="run") == (base, 0)
    for seq in range(5):
        backend.forward_backward("run", seq, request_of(rows_of(seq, [20, 20])))
        backend.optim_step("run", StepRequest(learning_rate=0.1))
    trained, step = tokens(run_id="run")
    assert step == 5
    assert trained != base
    backend.save_state("run", tmp_path, include_optimizer=False)
    for seq in range(5, 10):
        backend.forward_backward("run", seq, request_of(rows_of(seq, [20, 20])))
        backend.optim_step("run", StepRequest(learning_rate=0.1))
    assert tokens(run_id="run")[0] != trained
    saved = ArtifactWeights("art-1", tmp_path)
    assert tokens(artifact=saved) == (trained, 5)
    assert tokens(model_ref="tiny") == (base, 0)


def test_the_runs_seed_and_the_operation_draw(backend):
    for name, seed in (("a", 1), ("twin", 1), ("b", 2)):
        backend.open_run(name, settings(seed=seed), None)
    prompts = token_prompts(5)

    def draw(run: str, seq: int) -> list[int]:
        params = SamplingParams(max_tokens=12, stop=Stop())
        return (
            backend.sample(seq, SampleRequest(prompts, params, run_id=run))
            .completions[0]
            .tokens.tolist()
        )

    assert draw("a", 3) == draw("twin", 3)
    assert draw("a", 3) != draw("a", 4)
    assert draw("a", 3) != draw("b", 3)


def test_the_options_shape_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    points = [(i + 0.5) / 2000 for i in range(2000)]

    def shares(**options) -> list[float]:
        params = SamplingParams(**options)
        tokens, logprobs = pick(logits.expand(2000, 4), params, points)
        counts = torch.bincount(tokens, minlength=4) / 2000
        # The reported log-probability is that of the distribution drawn from.
        for token in tokens.unique():
            share = logprobs[tokens == token][0].exp().item()
            assert share == pytest.approx(counts[token].item(), abs=1e-3)
        return [round(c, 3) for c in counts.tolist()]

    p = torch.softmax(logits[0], 0)
    assert shares() == pytest.approx(p.tolist(), abs=1e-3)
    assert shares(temperature=2.0) == pytest.approx(
        torch.softmax(logits[0] / 2, 0).tolist(), abs=1e-3
    )
    two = (p / (p[0] + p[1]))[:2].tolist()
    assert shares(top_k=2) == pytest.approx([*two, 0, 0], abs=1e-3)
    # 0.644, 0.237, 0.087, 0.032: the smallest set with 0.7 is the first two.
    assert shares(top_p=0.7) == pytest.approx([*two, 0, 0], abs=1e-3)
    assert shares(top_p=0.6) == [1, 0, 0, 0]
    assert shares(min_p=0.3) == pytest.approx([*two, 0, 0], abs=1e-3)
    assert shares(temperature=0) == [1, 0, 0, 0]
    assert shares(top_k=99) == shares()


def test_nan_weights_are_an_error_not_a_completion(backend):
    backend.open_run("run", settings(), None)
    with torch.no_grad():
        backend._runs["run"].adapter.weights.fill_(float("nan"))
    for temperature in (0, 1):
        params = SamplingParams(temperature=temperature)
        with pytest.raises(TenSafeFault, match="NaN"):
            backend.sample(1, SampleRequest(token_prompts(4), params, run_id="run"))
    assert base_sample(backend, token_prompts(4), temperature=0, max_tokens=3)
