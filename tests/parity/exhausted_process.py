"""A process whose memory really ends, and comes back.

python tests/parity/exhausted_process.py THREADS
"""

from __future__ import annotations

import hashlib
import resource
import sys
from pathlib import Path

import torch
from parity.tiny_runs import perturb, request_of, rows_of, settings, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend

LENGTHS = [64] * 8
"""Enough for two strands."""
_ROOM_BYTES = 2**20
_TRIES = 50


def gradient(backend: TorchBackend, lengths: list[int]) -> str:
    """A digest of what a call adds to its window, which is dropped then."""
    try:
        backend.forward_backward("run", 1, request_of(rows_of(1, lengths)))
        own = backend._runs["run"].accumulator
        return hashlib.sha256(own.numpy().tobytes()).hexdigest()
    finally:
        backend.drop_window("run")


def limit_to(size_bytes: int) -> None:
    """The process's memory from here on."""
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))


def exhaust(backend: TorchBackend) -> str:
    """The reason that a call of another shape fails with while nothing more can be had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_to(pages * resource.getpagesize() + _ROOM_BYTES)
    try:
        for shorter in range(1, _TRIES):
            gradient(backend, [length - shorter for length in LENGTHS])
    except TenSafeFault as fault:
        return str(fault.detail.reason)
    finally:
        limit_to(resource.RLIM_INFINITY)
    return "memory never ended"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    backend = TorchBackend([freeze("tiny", tiny_llama().bfloat16())])
    backend.open_run("run", settings(), None)
    perturb(backend, "run")
    print(gradient(backend, LENGTHS))
    print(exhaust(backend))
    print(gradient(backend, LENGTHS))
    print(gradient(backend, [59, 58, 57]) != "")
