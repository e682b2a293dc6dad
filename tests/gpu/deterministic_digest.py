"""Prints what four calls of a deterministic run came to, for a process of its own."""

from __future__ import annotations

import hashlib

from gpu.gpu_models import middle
from parity.tiny_runs import request_of, rows_of, settings

from workers.engine.engine import TorchBackend
from workers.operations import StepRequest


def main() -> None:
    backend = TorchBackend([middle()])
    backend.open_run("run", settings(deterministic=True, lora={"dropout": 0.1}), None)
    for seed in range(4):
        outcome = backend.forward_backward("run", 1, request_of(rows_of(seed, [60, 33, 17])))
        backend.optim_step("run", StepRequest())
        weights = backend._runs["run"].adapter.weights.detach().cpu().numpy()
        print(hashlib.sha256(outcome.logprobs.tobytes() + weights.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
