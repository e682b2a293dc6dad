"""SFT on SmolLM2: through the service, by the same engine in a local loop, and by plain `peft`.

The three take turns, on the same number of threads and the same element type, with every token of
every row scored; only one of them computes at a time, in another order each round. A round's figure
is tokens per second of `steps` pipelined steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from workers.threads import pick_threads

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from local_service import local_service
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tensafe_client import ServiceClient
from workers.engine.loading import load_backend, pick_dtype
from workers.engine.model_sources import resolve
from workers.operations import Batch, LossRequest, RunSettings, StepRequest

MODEL = "smollm2-135m"
SHAPES = {"4x128": (4, 128), "8x256": (8, 256)}
TARGETS = ["q_proj", "v_proj", "k_proj", "o_proj"]
Steps = Callable[[np.ndarray, int], None]


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each round, by `SHAPE/WHO`."""
    torch.set_num_threads(pick_threads(1))
    cells: dict[str, list[float]] = {}
    with local_service(backend="torch", models=[MODEL]) as service:
        client = ServiceClient(service.target, api_key=service.api_key)
        loops: dict[str, Steps] = {
            "service": _service_loop(client),
            "engine_loop": _engine_loop(),
            "plain_loop": _plain_loop(),
        }
        for shape, (rows, length) in SHAPES.items():
            ids = np.random.default_rng(0).integers(0, 49_000, (rows, length))
            for loop in loops.values():
                loop(ids, 1)
            for turn in range(rounds):
                for name, loop in list(loops.items())[:: 1 if turn % 2 == 0 else -1]:
                    begin = time.perf_counter()
                    loop(ids, steps)
                    rate = ids.size * steps / (time.perf_counter() - begin)
                    cells.setdefault(f"{shape}/{name}", []).append(rate)
        client.close()
    return cells


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the rounds' quotients."""
    found = {}
    for shape in SHAPES:
        for other in ("engine_loop", "plain_loop"):
            pairs = zip(cells[f"{shape}/service"], cells[f"{shape}/{other}"], strict=True)
            found[f"{shape} service/{other}"] = median(ours / theirs for ours, theirs in pairs)
    return found


def _service_loop(client: ServiceClient) -> Steps:
    tc = client.create_training_client({"model_ref": MODEL, "seed": 0})

    def run(ids: np.ndarray, steps: int) -> None:
        batch = {"input_ids": ids, "labels": ids}
        futures = [(tc.forward_backward(batch), tc.optim_step()) for _ in range(steps)]
        for passed, updated in futures:
            passed.result()
            updated.result()

    return run


def _engine_loop() -> Steps:
    backend = load_backend([MODEL], device="auto", dtype="auto", threads=pick_threads(1))
    backend.open_run("run-bench", RunSettings(model_ref=MODEL), None)

    def run(ids: np.ndarray, steps: int) -> None:
        rows, length = ids.shape
        batch = Batch(
            offsets=np.arange(rows + 1, dtype=np.int64) * (length - 1),
            input_tokens=np.ascontiguousarray(ids[:, :-1], dtype=np.int32).reshape(-1),
            target_tokens=np.ascontiguousarray(ids[:, 1:], dtype=np.int32).reshape(-1),
        )
        for seq in range(steps):
            backend.forward_backward("run-bench", seq + 1, LossRequest(batch))
            backend.optim_step("run-bench", StepRequest())

    return run


def _plain_loop() -> Steps:
    source = resolve(MODEL)
    base: Any = AutoModelForCausalLM.from_pretrained(
        source.location, dtype=pick_dtype("auto", "cpu")
    )
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
    model = get_peft_model(base, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def run(ids: np.ndarray, steps: int) -> None:
        rows = torch.as_tensor(ids)
        for _ in range(steps):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run
