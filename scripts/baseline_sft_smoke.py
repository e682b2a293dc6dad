"""Baseline SFT smoke test: 20 steps, a sample, a checkpoint, through the real service.

    scripts/baseline_sft_smoke.py                        mock backend, a service of its own
    scripts/baseline_sft_smoke.py --backend torch        SmolLM2-135M, a service of its own
    scripts/baseline_sft_smoke.py --target HOST:PORT     a service that runs already
    scripts/baseline_sft_smoke.py --save-golden          write tests/golden/baseline_*.json anew

Exits with 1 when an assertion fails. docs/baseline_sft.md shows the expected output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_service import local_service

from tensafe_client import ServiceClient
from tensafe_client.data import docstring_pairs, split_by_module
from tensafe_client.data.chat import ChatTokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden"
GOLDEN_SEED = 42
MODEL = "smollm2-135m"
STEPS = 20
BATCH_SIZE = 4
PROMPT = "Once upon a time"
SYNTHETIC_BATCH = {
    "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]] * BATCH_SIZE,
    "attention_mask": [[1] * 8] * BATCH_SIZE,
    "labels": [[-100, -100, 3, 4, 5, 6, 7, 8]] * BATCH_SIZE,
}


class SmokeError(AssertionError):
    """The service did not do what the page promises."""


@dataclass(frozen=True)
class Measured:
    """What one smoke run saw.

    Attributes:
        losses: of each step's forward_backward.
        grad_norms: of each step's forward_backward.
        completion: what was sampled after the last step.
        saved_step: step of the checkpoint.
        loaded_step: step after loading it.
    """

    losses: list[float]
    grad_norms: list[float]
    completion: str
    saved_step: int
    loaded_step: int

    @property
    def loss_decreased(self) -> bool:
        """Whether the last step's loss is below the first one's."""
        return self.losses[-1] < self.losses[0]


def smoke(client: ServiceClient, *, seed: int | None, say: Callable[[str], None]) -> Measured:
    """Trains, samples, saves and loads, and says each as the page shows it.

    Raises:
        SmokeError: if something is not as it should be.
    """
    is_mock = client.model(MODEL).accepts_any_reference
    config: dict[str, Any] = {"model_ref": MODEL, "batch_size": BATCH_SIZE}
    if seed is not None:
        config["seed"] = seed
    if not is_mock:
        config["optimizer"] = {"learning_rate": 1e-3}
    batch = SYNTHETIC_BATCH if is_mock else _real_batch(client)

    say("=== TenSafe Baseline SFT Smoke Test ===\n")
    tc = client.create_training_client(config)
    sent = [(tc.forward_backward(batch), tc.optim_step()) for _ in range(STEPS)]
    losses, grad_norms = [], []
    for number, (passed, updated) in enumerate(sent, start=1):
        result, step = passed.result(), updated.result().step
        _require(step == number, f"step {number} answered that it is step {step}")
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        say(f"[Step {number}/{STEPS}] loss={result.loss:.3f}, grad_norm={result.grad_norm:.3f}")
    decreased = losses[-1] < losses[0]
    say("\nTraining complete!")
    say(f"  Initial loss: {losses[0]:.3f}")
    say(f"  Final loss: {losses[-1]:.3f}")
    say(f"  Loss decreased: {decreased}")
    _require(decreased, f"the loss did not decrease: {losses[0]:.3f} to {losses[-1]:.3f}")
    if is_mock:
        _check_mock(losses, grad_norms)

    say("\nSampling from trained model...")
    sampled = tc.sample(prompts=[PROMPT], max_tokens=100, temperature=0.7).samples[0]
    completion = sampled.completion.removeprefix(" ")
    say(f'  Prompt: "{sampled.prompt}"')
    say(f"  Completion: {completion}")
    _require(sampled.prompt == PROMPT, f"the prompt came back as {sampled.prompt!r}")
    _require(bool(completion), "the completion is empty")
    if is_mock:
        expected = f"[Mock completion for step {STEPS}]"
        _require(completion == expected, f"the completion is {completion!r}, not {expected!r}")

    say("\nCheckpoint test...")
    saved = tc.save_state(metadata={"notes": "baseline smoke test"})
    say(f"  Saved checkpoint: {saved.artifact_id}")
    loaded = tc.load_state(saved.artifact_id)
    _require(loaded.step == saved.step == STEPS, f"saved {saved.step}, loaded {loaded.step}")
    say("  Loaded checkpoint successfully")
    say("\n=== All baseline tests passed! ===")
    return Measured(losses, grad_norms, completion, saved.step, loaded.step)


def goldens(measured: Measured) -> dict[str, Any]:
    """The golden files' content by name; the same for the same seed, on any machine."""
    return {
        "baseline_sft_metrics.json": {
            "backend": "mock",
            "seed": GOLDEN_SEED,
            "steps": STEPS,
            "initial_loss": round(measured.losses[0], 6),
            "final_loss": round(measured.losses[-1], 6),
            "loss_decreased": measured.loss_decreased,
            "grad_norms": [round(norm, 6) for norm in measured.grad_norms],
            "completion": measured.completion,
            "saved_step": measured.saved_step,
            "loaded_step": measured.loaded_step,
        },
        "baseline_loss_curve.json": {
            "seed": GOLDEN_SEED,
            "steps": list(range(1, STEPS + 1)),
            "losses": [round(loss, 6) for loss in measured.losses],
        },
    }


def _check_mock(losses: list[float], grad_norms: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        expected = max(0.1, 2.5 - 0.01 * step)
        _require(abs(loss - expected) < 1e-9, f"loss {loss} at step {step}, not {expected}")
    outside = [norm for norm in grad_norms if not 1.5 <= norm <= 1.599]
    _require(not outside, f"grad_norm outside [1.500, 1.599]: {outside}")


def _real_batch(client: ServiceClient) -> list[Any]:
    tokenizer = ChatTokenizer(client.tokenizer_files(MODEL))
    train, _ = split_by_module(docstring_pairs())
    return [tokenizer.datum(pair.example()) for pair in train[:BATCH_SIZE]]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SmokeError(otherwise)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Baseline SFT smoke test.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--backend", choices=["mock", "torch"], default="mock")
    where.add_argument("--target", help="a running service; its key as for every client")
    parser.add_argument("--seed", type=int, help="seed of the run; drawn by the service if unset")
    parser.add_argument(
        "--save-golden", action="store_true", help="write tests/golden anew (mock backend)"
    )
    arguments = parser.parse_args()
    if arguments.save_golden:
        if arguments.target or arguments.backend != "mock" or arguments.seed is not None:
            parser.error("--save-golden goes with no other option: the goldens are the mock's")
        arguments.seed = GOLDEN_SEED
    return arguments


def _run(arguments: argparse.Namespace) -> Measured:
    if arguments.target:
        with ServiceClient(arguments.target) as client:
            return smoke(client, seed=arguments.seed, say=print)
    models = [MODEL] if arguments.backend == "torch" else []
    with (
        local_service(backend=arguments.backend, models=models) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        return smoke(client, seed=arguments.seed, say=print)


def main() -> int:
    """Runs the smoke test; returns the exit status."""
    arguments = _arguments()
    try:
        measured = _run(arguments)
    except SmokeError as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    if arguments.save_golden:
        for name, content in goldens(measured).items():
            (GOLDEN / name).write_text(json.dumps(content, indent=2) + "\n")
            print(f"wrote {GOLDEN / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
