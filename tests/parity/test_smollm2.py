"""The real model: SmolLM2-135M-Instruct, converted, sampled and trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.tiny_runs import metric

from workers.engine.loading import load_backend
from workers.operations import (
    Batch,
    ChatMessage,
    LoraSettings,
    LossRequest,
    OptimizerSettings,
    Prompt,
    RunSettings,
    SampleRequest,
    SamplingParams,
    StepRequest,
    Stop,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "smollm2-135m"
CHAT = Prompt(chat=(ChatMessage("user", "What is the capital of France?"),))


@pytest.fixture(scope="module")
def backend():
    return load_backend([NAME], device="cpu", dtype="float32", threads=1)


def greedy(backend, prompt: Prompt, **params):
    options = {"temperature": 0, "max_tokens": 24} | params
    request = SampleRequest([prompt], SamplingParams(**options), model_ref=NAME)
    return backend.sample("op-1", request).completions[0]


def test_it_is_registered_with_its_tokenizer(backend):
    (card,) = backend.models()
    assert (card.name, card.vocabulary_size, card.context_length) == (NAME, 49152, 8192)
    assert card.parameters == 134_515_008
    assert card.linear_modules["q_proj"] == 30
    assert card.has_chat_template
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(card.tokenizer_files)


def test_it_knows_the_capital_of_france(backend):
    answer = greedy(backend, CHAT)
    assert "Paris" in answer.text
    assert answer.stopped
    assert "<|im_end|>" not in answer.text
    assert answer.prompt.endswith("<|im_start|>assistant\n")


def test_stop_texts_cut_and_keep_their_tokens_out(backend):
    whole = greedy(backend, CHAT)
    cut = greedy(backend, CHAT, stop=Stop(strings=("Paris",)))
    assert cut.stopped
    assert cut.text == whole.text[: whole.text.index("Paris")]
    assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist()
    assert len(cut.tokens) == len(cut.logprobs) < len(whole.tokens)


def test_a_leading_space_is_part_of_the_completion(backend):
    completion = greedy(backend, Prompt(text="The capital of France is"), max_tokens=2)
    assert completion.text.startswith(" ")
    assert completion.prompt == "The capital of France is"


def test_it_learns_a_sentence(backend):
    model = backend._models[NAME]
    tokens = np.asarray(model.tokenizer("A tensafe is a box that only tensors open.").input_ids)
    inputs, targets = tokens[:-1].astype(np.int32), tokens[1:].astype(np.int32)
    request = LossRequest(Batch(np.asarray([0, len(inputs)]), inputs, targets))
    settings = RunSettings(
        NAME, lora=LoraSettings(), optimizer=OptimizerSettings(learning_rate=1e-3), seed=1
    )
    backend.open_run("run", settings, None)
    try:
        first = metric(backend.forward("run", request), "loss")
        for seq in range(40):
            backend.forward_backward("run", seq, request)
            backend.optim_step("run", StepRequest())
        last = metric(backend.forward("run", request), "loss")
        assert first > 2.5
        assert last < 1.0
        prompt = Prompt(tokens=inputs[:4])
        sample = SampleRequest(
            [prompt], SamplingParams(temperature=0, max_tokens=len(targets) - 3), run_id="run"
        )
        learned = backend.sample(99, sample).completions[0]
        assert learned.tokens.tolist() == targets[3:].tolist()
    finally:
        backend.close_run("run")
    assert "Paris" in greedy(backend, CHAT).text
    assert torch.get_num_threads() == 1
