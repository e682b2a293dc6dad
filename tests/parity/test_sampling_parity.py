"""Generation against `transformers`' own, and what a completion must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.tiny_runs import VOCABULARY, request_of, rows_of, settings, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.engine.sampling.distribution import Workspace, draw
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
    # The token that ended it is its last.
    assert stopped[0].tokens.tolist() == free.tokens[: first + 1].tolist()
    assert stopped[0].stopped
    assert len(stopped[0].logprobs) == len(stopped[0].raw_logprobs) == first + 1
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
        drawn = draw(logits.repeat(2000, 1), [params] * 2000, points, Workspace())
        tokens, logprobs = torch.tensor(drawn.tokens), torch.tensor(drawn.logprobs)
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


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 1e-12])
def test_a_tiny_temperature_is_greedy(backend, temperature):
    prompts = token_prompts(5, 9)
    greedy = base_sample(backend, prompts, temperature=0, max_tokens=8, stop=Stop())
    tiny = base_sample(backend, prompts, temperature=temperature, max_tokens=8, stop=Stop())
    shaped = base_sample(
        backend, prompts, temperature=temperature, max_tokens=8, top_p=0.9, top_k=3, min_p=0.1
    )
    for ours in (tiny, shaped):
        for expected, completion in zip(greedy, ours, strict=True):
            assert completion.tokens.tolist() == expected.tokens.tolist()
            assert not completion.logprobs.any()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40])
def test_a_tiny_temperature_takes_extreme_logits(temperature):
    logits = torch.tensor([[3e38, -3e38, 0.0, -torch.inf], [-1.0, -1.5, -2.0, -3.0]])
    params = [SamplingParams(temperature=temperature)] * 2
    drawn = draw(logits, params, [0.5, 0.999], Workspace())
    assert drawn.tokens == drawn.logprobs == [0, 0]


def test_seed_zero_is_a_seed(backend):
    """It is neither the run's nor none at all."""
    backend.open_run("run", settings(seed=5), None)
    prompts = token_prompts(5)

    def draw(seq: int, seed: int | None) -> list[int]:
        params = SamplingParams(max_tokens=16, stop=Stop(), seed=seed)
        request = SampleRequest(prompts, params, run_id="run")
        return backend.sample(seq, request).completions[0].tokens.tolist()

    assert draw(3, 0) == draw(4, 0) == draw(9, 0)
    assert draw(3, 0) != draw(3, None)
    assert draw(3, 0) != draw(3, 1)
    assert draw(3, None) != draw(4, None)


@pytest.mark.parametrize("complete", [False, True])
def test_a_saved_versions_draws_are_fixed_by_its_runs_seed_and_step(base, tmp_path, complete):
    prompts = token_prompts(5)
    request = request_of(rows_of(1, [20]))

    def saved(name: str, seed: int, steps: int, backend: TorchBackend) -> ArtifactWeights:
        backend.open_run(name, settings(seed=seed), None)
        backend._runs[name].adapter.initialize(1)
        for seq in range(steps):
            backend.forward_backward(name, seq, request)
            # The weights stay, so that only seed and step can tell the draws apart.
            backend.optim_step(name, StepRequest(learning_rate=0.0))
        directory = tmp_path / name
        directory.mkdir()
        backend.save_state(name, directory, include_optimizer=complete)
        return ArtifactWeights(f"art-{name}", directory)

    def draw(backend: TorchBackend, artifact: ArtifactWeights, operation: str, seed=None):
        params = SamplingParams(max_tokens=16, stop=Stop(), seed=seed)
        outcome = backend.sample(operation, SampleRequest(prompts, params, artifact=artifact))
        return outcome.completions[0].tokens.tolist()

    backend = TorchBackend([base])
    run = saved("run", 7, 1, backend)
    first = draw(backend, run, "op-1")
    assert draw(backend, run, "op-2") == first
    assert draw(TorchBackend([base]), run, "op-3") == first
    assert draw(backend, saved("twin", 7, 1, backend), "op-1") == first
    assert draw(backend, saved("other", 8, 1, backend), "op-1") != first
    assert draw(backend, saved("later", 7, 2, backend), "op-1") != first
    assert draw(backend, run, "op-1", seed=0) != first
    # Current weights at the seq that equals the step draw otherwise.
    params = SamplingParams(max_tokens=16, stop=Stop())
    current = backend.sample(1, SampleRequest(prompts, params, run_id="run"))
    assert current.completions[0].tokens.tolist() != first


def test_a_base_models_draws_come_from_the_operation(backend):
    def draw(operation: str) -> list[int]:
        request = SampleRequest(
            token_prompts(5), SamplingParams(max_tokens=16, stop=Stop()), model_ref="tiny"
        )
        return backend.sample(operation, request).completions[0].tokens.tolist()

    assert draw("op-1") == draw("op-1")
    assert draw("op-1") != draw("op-2")


def test_stop_texts_end_a_completion():
    words = {f"w{number:02d}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))
    backend = TorchBackend([freeze("tiny", tiny_llama(), tokenizer=tokenizer)])
    prompts = token_prompts(5, 8)
    free = base_sample(backend, prompts, temperature=0, max_tokens=12, stop=Stop())
    names = free[0].text.split()
    assert len(names) == 12
    at = next(i for i in range(3, 12) if names[i] not in names[:i])
    # The text spans two tokens and ends within the second.
    text = free[0].text[free[0].text.index(names[at]) - 2 :][:4]
    ours, beside = base_sample(
        backend, prompts, temperature=0, max_tokens=12, stop=Stop(strings=("absent", text))
    )
    assert ours.stopped
    assert ours.text == free[0].text[: free[0].text.index(text)]
    assert ours.tokens.tolist() == free[0].tokens[: at + 1].tolist()
    assert len(ours.logprobs) == len(ours.raw_logprobs) == at + 1
    assert beside.tokens.tolist() == free[1].tokens.tolist()
    assert not beside.stopped


def test_nan_weights_are_an_error_not_a_completion(backend):
    backend.open_run("run", settings(), None)
    with torch.no_grad():
        backend._runs["run"].adapter.weights.fill_(float("nan"))
    for temperature in (0, 1):
        params = SamplingParams(temperature=temperature)
        with pytest.raises(TenSafeFault, match="NaN"):
            backend.sample(1, SampleRequest(token_prompts(4), params, run_id="run"))
    assert base_sample(backend, token_prompts(4), temperature=0, max_tokens=3)
