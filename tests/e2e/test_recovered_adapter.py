"""A worker that is killed loses nothing: its runs are replayed, and go on to the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from local_service import LocalService, local_service

from tensafe_client import Datum, ServiceClient

STEPS = 6
KILL_AFTER = 3
BATCH = [Datum([5, 6, 7, 8], [6, 7, 8, 9])]


def worker_ids(service: LocalService) -> list[int]:
    """Process ids of the service's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(fields[1]) == service.process.pid and b"workers" in command:
            found.append(int(path.parent.name))
    return found


def train(service: LocalService, client: ServiceClient, *, kill: bool) -> tuple[list[float], str]:
    run = client.create_training_client({"model_ref": "tiny", "seed": 1, "deterministic": True})
    losses = []
    for number in range(STEPS):
        passed = run.forward_backward(BATCH)
        run.optim_step(learning_rate=1e-2)
        losses.append(passed.result(timeout=120).loss)
        if kill and number == KILL_AFTER:
            (worker,) = worker_ids(service)
            os.kill(worker, signal.SIGKILL)
    files = client.artifact(run.save_state().artifact_id).files
    return losses, next(file.sha256 for file in files if file.name == "adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_after_its_worker_was_killed(
    tiny_model: Path, tmp_path: Path
):
    with (
        local_service(
            backend="torch", models=[f"tiny={tiny_model}"], directory=tmp_path
        ) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        undisturbed = train(service, client, kill=False)
        disturbed = train(service, client, kill=True)
        assert "starting it again" in service.log
    assert disturbed == undisturbed
    assert len(set(undisturbed[0])) == STEPS
