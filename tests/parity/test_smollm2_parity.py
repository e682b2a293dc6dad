"""The real model against plain `peft`: float32 closely, bfloat16 no worse than `peft` itself."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_runs import perturb, request_of
from torch import Tensor

from workers.engine.engine import TorchBackend
from workers.engine.loading import load_model
from workers.engine.model_sources import resolve
from workers.operations import LoraSettings, OptimizerSettings, RunSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LENGTHS = [23, 61, 9, 44]
MASKED = [11, 36, 0, 20]
LORA = LoraSettings(rank=16, alpha=32.0, dropout=0.0)
TEXT = (
    "A fine-tuning service trains many small adapters over one frozen model. Each tenant sends its "
    "own batches, and gets its own gradients back; nobody sees what the others do. The matrix "
    "products of the frozen model take all tokens at once, whoever they belong to, and each "
    "adapter adds its own part to its own rows. What is saved can be loaded elsewhere. In winter "
    "the rivers freeze, and the boats lie on the banks until the ice breaks with a noise like "
    "thunder. Add two cups of flour, one egg and a little salt, and knead until it is smooth."
)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one way of computing gives: scored log-probabilities [S], and mean-loss gradients."""

    logprobs: Tensor
    gradients: dict[str, Tensor]

    def flat(self) -> Tensor:
        """All gradients end to end, in float64."""
        return torch.cat([self.gradients[name].double().flatten() for name in self.gradients])


def rows(tokenizer) -> list[np.ndarray]:
    tokens = np.asarray(tokenizer(TEXT).input_ids * 2, np.int32)
    begins = np.cumsum([0, *(length + 1 for length in LENGTHS)])
    assert begins[-1] <= len(tokens)
    return [tokens[a:b] for a, b in pairwise(begins)]


def numbers(dtype: torch.dtype) -> tuple[Numbers, Numbers]:
    """The engine's and plain `peft`'s."""
    model = load_model(resolve("smollm2-135m"), "cpu", dtype)
    batch = rows(model.tokenizer)
    backend = TorchBackend([model], token_budget=4096)
    options = RunSettings(
        "smollm2-135m", lora=LORA, optimizer=OptimizerSettings(learning_rate=1e-3), seed=1
    )
    backend.open_run("run", options, None)
    perturb(backend, "run")
    outcome = backend.forward_backward("run", 1, request_of(batch, masked=MASKED))
    run = backend._runs["run"]
    gradient = run.adapter.named((run.accumulator / run.window.denominator).clone())
    scored = np.concatenate(
        [np.arange(n) >= m for n, m in zip(LENGTHS, MASKED, strict=True)]
    ).astype(bool)
    ours = Numbers(torch.from_numpy(outcome.logprobs[scored]).double(), gradient)

    plain = PlainPeft(plain_model(dtype), run)
    plain.loss(batch, MASKED).backward()
    everywhere = torch.cat(plain.logprobs(batch)).double()
    theirs = Numbers(
        everywhere[torch.from_numpy(scored)],
        {name: tensor.grad for name, tensor in plain.named().items()},
    )
    del backend, model, plain
    gc.collect()
    return ours, theirs


def plain_model(dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    source = resolve("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype).eval()


@pytest.fixture(scope="module")
def float32() -> tuple[Numbers, Numbers]:
    return numbers(torch.float32)


def apart(ours: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def test_float32_is_plain_pefts(float32):
    ours, theirs = float32
    logprobs = (ours.logprobs - theirs.logprobs).abs().max().item()
    distances = {
        name: apart(ours.gradients[name], theirs.gradients[name]) for name in theirs.gradients
    }
    worst = max(distances, key=distances.__getitem__)
    print(f"float32: logprobs {logprobs:.2e}, worst gradient {distances[worst]:.2e} of {worst}")
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert len(distances) == 2 * 4 * 30
    assert logprobs <= 1e-4
    assert distances[worst] <= 1e-4, worst


def test_bfloat16_errs_no_more_than_plain_peft(float32):
    _, truth = float32
    ours, theirs = numbers(torch.bfloat16)
    ratios = {}
    for what, error in {
        "logprobs": lambda found: (found.logprobs - truth.logprobs).square().mean().sqrt().item(),
        "gradients": lambda found: apart(found.flat(), truth.flat()),
    }.items():
        own, plain = error(ours), error(theirs)
        ratios[what] = own / plain
        print(f"bfloat16 {what}: {own:.3e} against plain peft's {plain:.3e}: {ratios[what]:.2f}")
        assert plain > 1e-3
    assert max(ratios.values()) <= 1.25, ratios
