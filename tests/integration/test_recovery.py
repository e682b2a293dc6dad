"""Kill what you like: accepted operations run once, in order, and futures only take longer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from harness.processes import Restartable, kill_worker, wait_until_gone, worker_pids
from harness.tiny_model import save_tiny_model
from local_service import local_service

from tensafe_client import Datum, ServiceClient, TrainingClient

STEPS = 6


def batch(step: int) -> list[Datum]:
    tokens = np.random.default_rng(step).integers(3, 200, (2, 24))
    return [Datum(tokens=row[:-1], target_tokens=row[1:], weights=[1.0] * 23) for row in tokens]


def train(tc: TrainingClient, steps: range) -> list[float]:
    futures = [(tc.forward_backward(batch(step)), tc.optim_step()) for step in steps]
    return [passed.result(120).loss for passed, updated in futures if updated.result(120).applied]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def test_a_killed_worker_costs_time_and_no_bit(tmp_path: Path, tiny_model: Path):
    config = {"model_ref": "tiny", "seed": 7, "optimizer": {"learning_rate": 1e-2}}
    with (
        local_service(
            backend="torch",
            models=[f"tiny={tiny_model}"],
            options=["--dtype", "float32"],
            directory=tmp_path,
        ) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        undisturbed = train(client.create_training_client(config), range(STEPS))
        tc = client.create_training_client(config)
        before = train(tc, range(2))
        tc.save_state()  # from here on a replay begins at this artifact
        before += train(tc, range(2, 4))
        kill_worker(service)
        after = train(tc, range(4, STEPS))
        assert before + after == undisturbed
        assert tc.refresh().step == STEPS


def test_a_killed_coordinator_loses_nothing_and_repeats_nothing(tmp_path: Path):
    service = Restartable(tmp_path, "--backend", "mock")
    service.start()
    import tomllib

    key = tomllib.loads((tmp_path / "config.toml").read_text())["profiles"]["local"]["api_key"]
    with ServiceClient(f"127.0.0.1:{service.port}", api_key=key) as client:
        tc = client.create_training_client({"model_ref": "any", "seed": 1})
        first = [(tc.forward_backward(batch(step)), tc.optim_step()) for step in range(40)]
        first[5][1].result(60)
        service.kill()
        second = [(tc.forward_backward(batch(step)), tc.optim_step()) for step in range(40)]
        service.start()
        steps = [updated.result(60).step for _, updated in first + second]
        losses = [passed.result(60).loss for passed, _ in first + second]
        assert steps == list(range(1, 81))
        assert losses == pytest.approx([max(0.1, 2.5 - 0.01 * step) for step in steps])
        assert [item.step for item in tc.metrics()] == steps
        assert tc.refresh().step == 80
    assert service.stop() == 0


def test_a_run_goes_on_after_a_restart_with_what_was_saved(tmp_path: Path, tiny_model: Path):
    config = {"model_ref": "tiny", "seed": 3, "gradient_accumulation_steps": 2}
    service = Restartable(
        tmp_path, "--backend", "torch", "--model", f"tiny={tiny_model}", "--dtype", "float32"
    )
    service.start()
    import tomllib

    key = tomllib.loads((tmp_path / "config.toml").read_text())["profiles"]["local"]["api_key"]
    target = f"127.0.0.1:{service.port}"
    with ServiceClient(target, api_key=key) as client:
        whole = client.create_training_client(config)
        expected = [whole.forward_backward(batch(0)).result(60).loss]
        whole.optim_step().result(60)
        expected += train(whole, range(1, 6))
        tc = client.create_training_client(config)
        seen = [tc.forward_backward(batch(0)).result(60).loss]
        tc.optim_step().result(60)  # the window is half full now
        run_id = tc.run_id
    service.kill()
    service.start()
    with ServiceClient(target, api_key=key) as client:
        tc = client.training_client(run_id)
        seen += train(tc, range(1, 6))
    assert seen == expected
    assert service.stop() == 0


def test_workers_end_with_the_process_that_started_them(tmp_path: Path):
    service = Restartable(tmp_path, "--backend", "mock")
    service.start()
    [worker] = worker_pids(service)  # type: ignore[arg-type]
    service.kill()
    wait_until_gone(worker)


@pytest.mark.slow
def test_an_operation_that_loses_two_workers_fails_by_itself(tmp_path: Path, tiny_model: Path):
    tokens = np.random.default_rng(0).integers(3, 200, (1500, 100))
    heavy = {"input_ids": tokens, "labels": tokens}
    with (
        local_service(
            backend="torch",
            models=[f"tiny={tiny_model}"],
            options=["--dtype", "float32"],
            directory=tmp_path,
        ) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        tc = client.create_training_client({"model_ref": "tiny", "seed": 5})
        deadly = tc.forward_backward(heavy)
        killed: list[int] = []
        while len(killed) < 2:
            fresh = [pid for pid in worker_pids(service) if pid not in killed]
            operation_id = deadly.operation_id
            if fresh and operation_id and client.operation(operation_id).state == "running":
                os.kill(fresh[0], signal.SIGKILL)
                killed += fresh
            assert not deadly.done()
        error = deadly.exception(120)
        assert error is not None
        assert "worker was lost" in str(error)
        assert tc.optim_step().exception(120) is not None  # its window has a hole
        assert train(tc, range(1))
        assert tc.refresh().step == 1
