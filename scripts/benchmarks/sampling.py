"""The sampler against `transformers.generate` called tenant by tenant, on one model and machine.

Both take turns in one process on the same threads and element type, on the same prompts and the
same adapters, without end tokens, so that each gives every row the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from workers.engine.engine import TorchBackend
from workers.operations import (
    Int32,
    LoraSettings,
    Prompt,
    RunSettings,
    SampleRequest,
    SamplingParams,
    Stop,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 16, 32.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is sampled: each tenant its own prompts, with an adapter of its own.

    Attributes:
        lengths: of the prompts of one tenant, tokens.
        tokens: of each completion.
        temperature: 0 takes the likeliest tokens.
    """

    tenants: int
    lengths: tuple[int, ...]
    tokens: int
    temperature: float

    def prompts(self, vocabulary: int) -> list[list[Int32]]:
        """Random token ids for each tenant."""
        rng = np.random.default_rng(3)
        return [
            [rng.integers(0, vocabulary, length).astype(np.int32) for length in self.lengths]
            for _ in range(self.tenants)
        ]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared: the loaded engine, and a maker of the same base model without it."""

    backend: TorchBackend
    model: str
    plain: Callable[[], Any]
    vocabulary: int
    rounds: int
    clock: Callable[[], float]


def measure(setting: Setting, load: Load) -> dict[str, list[float]]:
    """Seconds of each round, ours and theirs, and ours one tenant after the other."""
    backend = setting.backend
    runs = [f"run-{index}" for index in range(load.tenants)]
    prompts = load.prompts(setting.vocabulary)
    with TemporaryDirectory() as name:
        for index, run in enumerate(runs):
            _open(backend, setting.model, run, index)
            directory = Path(name) / run
            directory.mkdir()
            backend.save_state(run, directory, include_optimizer=False)
        generate = _generate(setting.plain(), Path(name), runs, prompts, load)
        steps = {
            "sampler": lambda: _together(backend, runs, prompts, load),
            "in turn": lambda: [
                _together(backend, [run], [own], load)
                for run, own in zip(runs, prompts, strict=True)
            ],
            "generate": generate,
        }
        cells: dict[str, list[float]] = {}
        for step in steps.values():
            step()
        for _ in range(setting.rounds):
            for step_name, step in steps.items():
                begin = setting.clock()
                step()
                cells.setdefault(step_name, []).append(setting.clock() - begin)
    for run in runs:
        backend.close_run(run)
    return cells


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """How many times more tokens a second, by medians."""
    middle = {name: median(values) for name, values in cells.items()}
    return {
        f"sampler/{other}": middle[other] / middle["sampler"]
        for other in middle
        if other != "sampler"
    }


def _open(backend: TorchBackend, model: str, run: str, seed: int) -> None:
    lora = LoraSettings(RANK, ALPHA, 0.0, TARGETS)
    backend.open_run(run, RunSettings(model, lora=lora, seed=seed), None)
    with torch.no_grad():
        # B begins at 0, with which all tenants would be the same.
        weights = backend._runs[run].adapter.weights
        generator = torch.Generator().manual_seed(seed)
        weights += (0.01 * torch.randn(weights.shape, generator=generator)).to(weights)


def _together(
    backend: TorchBackend, runs: list[str], prompts: list[list[Int32]], load: Load
) -> None:
    sampler = backend.sampler
    params = SamplingParams(
        max_tokens=load.tokens, temperature=load.temperature, stop=Stop(), seed=1
    )
    for run, own in zip(runs, prompts, strict=True):
        request = SampleRequest([Prompt(tokens=tokens) for tokens in own], params, run_id=run)
        sampler.submit(run, 1, request)
    outcomes: list[Any] = []
    while len(outcomes) < len(runs):
        sampler.step()
        outcomes += [outcome for _, outcome in sampler.collect()]
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        if any(len(completion.tokens) != load.tokens for completion in outcome.completions):
            raise RuntimeError("a completion ended early")


def _generate(
    base: Any, adapters: Path, runs: list[str], prompts: list[list[Int32]], load: Load
) -> Callable[[], None]:
    """`generate` for one tenant after the other, its adapter switched to, its prompts padded."""
    model: Any = PeftModel.from_pretrained(base, str(adapters / runs[0]), adapter_name=runs[0])
    for run in runs[1:]:
        model.load_adapter(str(adapters / run), adapter_name=run)
    model.eval()
    batches = [_padded(own, model.device) for own in prompts]
    options: dict[str, Any] = {"do_sample": False}
    if load.temperature:
        options = {"do_sample": True, "temperature": load.temperature, "top_k": 0}

    def run_all() -> None:
        for run, batch in zip(runs, batches, strict=True):
            model.set_adapter(run)
            with torch.no_grad():
                found = model.generate(
                    **batch,
                    max_new_tokens=load.tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                    **options,
                )
            if found.shape[1] != batch["input_ids"].shape[1] + load.tokens:
                raise RuntimeError("a completion ended early")

    return run_all


def _padded(prompts: list[Int32], device: Any) -> dict[str, torch.Tensor]:
    """As `generate` wants them: padded on the left."""
    longest = max(len(tokens) for tokens in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, longest - len(tokens) :] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, longest - len(tokens) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
