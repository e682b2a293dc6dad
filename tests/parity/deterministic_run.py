"""One deterministic run, of which any part may be trained in a process of its own.

python tests/parity/deterministic_run.py THREADS STATE FIRST LAST
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from parity.tiny_runs import metric, perturb, request_of, rows_of, settings, tiny_llama

from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.operations import RunSettings, StepRequest

LENGTHS = [60, 7, 31] * 24
"""More than one pass of a deterministic run holds."""


def options(**changes: object) -> RunSettings:
    """Its configuration."""
    lora = {"rank": 6, "dropout": 0.2}
    return settings(**{"lora": lora, "deterministic": True, "accumulation_steps": 2} | changes)


def opened(backend: TorchBackend, **changes: object) -> TorchBackend:
    """The run at its beginning."""
    backend.open_run("run", options(**changes), None)
    perturb(backend, "run")
    return backend


def train_call(backend: TorchBackend, call: int) -> str:
    """One forward_backward; a digest of its loss, log-probabilities and summed gradient."""
    request = request_of(rows_of(call, LENGTHS[call:]), masked=call)
    outcome = backend.forward_backward("run", 2 * call + 1, request)
    digest = hashlib.sha256(outcome.logprobs.tobytes())
    digest.update(repr([metric(outcome, "loss"), metric(outcome, "grad_norm")]).encode())
    digest.update(backend._runs["run"].accumulator.numpy().tobytes())
    return digest.hexdigest()


def weights(backend: TorchBackend) -> str:
    """A digest of the adapter."""
    own = backend._runs["run"].adapter.weights.detach().numpy()
    return hashlib.sha256(own.tobytes()).hexdigest()


def train(backend: TorchBackend, calls: range) -> list[str]:
    """Digests of each call and of the weights after its optim_step."""
    found = []
    for call in calls:
        found.append(train_call(backend, call))
        backend.optim_step("run", StepRequest())
        found.append(weights(backend))
    return found


if __name__ == "__main__":
    threads, state, first, last = sys.argv[1:]
    torch.set_num_threads(int(threads))
    restarted = TorchBackend([freeze("tiny", tiny_llama())])
    restarted.open_run("run", options(), Path(state))
    print("\n".join(train(restarted, range(int(first), int(last)))))
