"""A worker's own disk fills up: what was to wait there stays in memory, and nobody's work fails."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from parity.tiny_runs import metric, request_of, rows_of, settings, tiny_llama

from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.operations import StepRequest

NAMES = ("a", "b")


def train(backend: TorchBackend, call: int) -> list[float]:
    """A call and an update of each run, in turn."""
    losses = []
    for name in NAMES:
        batch = request_of(rows_of(call, [9, 5]))
        losses.append(metric(backend.forward_backward(name, 2 * call + 1, batch), "loss"))
        backend.optim_step(name, StepRequest())
    return losses


def fill(directory: Path) -> Path:
    """Leaves no room on its disk, not even for a directory."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.fsync(file.fileno())
    return filler


def test_runs_stay_in_memory_while_the_disk_is_full(tmp_path, disk):
    base = freeze("tiny", tiny_llama())
    roomy, tight = (TorchBackend([base], run_bytes=size) for size in (2**30, 1))
    disk(tmp_path / "small", 4)
    tight._runs._directory.cleanup()
    tight._runs._directory.name = str(tmp_path / "small")
    filler = fill(tmp_path / "small")
    for backend in (roomy, tight):
        for name in NAMES:
            backend.open_run(name, settings(lora={"rank": 8, "dropout": 0.2}), None)
    assert train(tight, 0) == train(roomy, 0)
    assert set(tight._runs.resident) == set(NAMES)
    with filler.open("r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - 16 * 1024)
    assert train(tight, 1) == train(roomy, 1), "there is room for a part of it"
    assert set(tight._runs.resident) == set(NAMES)
    filler.unlink()
    assert train(tight, 2) == train(roomy, 2)
    assert tight._runs.resident == ["b"]
    for name in NAMES:
        assert torch.equal(tight._runs[name].adapter.weights, roomy._runs[name].adapter.weights)
