"""A worker's own disk fills up: what was to wait there stays in memory, and what cannot do without
says so."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from parity.tiny_runs import metric, request_of, rows_of, settings, tiny_llama
from unit.workers.planned import assignment, forward_backward, operation
from unit.workers.test_executor import OPTIM, SAVE, Driver, FolderTransfers, reason

from tensafe.v1 import training_pb2
from tensafe.wire.tensors import encode
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


def test_what_needs_room_says_so_and_works_when_there_is_some(tmp_path, disk, monkeypatch):
    small = tmp_path / "small"
    disk(small, 4)
    (tmp_path / "stored").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    backend = TorchBackend([freeze("tiny", tiny_llama())])
    driver = Driver(backend, FolderTransfers(tmp_path / "stored"))
    run = assignment(model_ref="tiny")
    step = driver.run(operation(1, **forward_backward()), operation(2, **OPTIM), runs=[run])
    saved = driver.run(*(operation(seq, artifact_id=f"art-{seq}", **SAVE) for seq in (3, 4, 5)))
    assert all(done.HasField("result") for done in [*step, *saved])
    load = {"load_state": training_pb2.LoadState(artifact_id="art-4")}
    params = training_pb2.SamplingParams(max_tokens=1)
    prompt = training_pb2.Prompt(tokens=encode(np.array([5, 6], np.int32)))
    sample = training_pb2.Sample(prompts=[prompt], params=params)
    sample.weights.artifact_id = "art-5"
    work = [SAVE, load, {"sample": sample}]

    filler = fill(small)
    for seq, kind in enumerate(work, 6):
        (failed,) = driver.run(operation(seq, artifact_id="art-6" if kind is SAVE else "", **kind))
        assert reason(failed) == "WORKER_DISK_FULL"
        assert f"0.0 MiB are free in {small}" in failed.error.message
    (trained, stepped) = driver.run(operation(9, **forward_backward()), operation(10, **OPTIM))
    assert trained.HasField("result")
    assert stepped.result.optim_step.step == 2
    filler.unlink()
    for seq, kind in enumerate(work, 11):
        (done,) = driver.run(operation(seq, artifact_id="art-7" if kind is SAVE else "", **kind))
        assert done.HasField("result"), done
    driver.executor.close()
