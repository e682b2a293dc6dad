"""Private runs through the service with a real worker: trained, killed, drawn for, reported."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.test_recovered_adapter import worker_ids
from harness.tiny_model import save_tiny_model
from local_service import LocalService, local_service
from safetensors.torch import load_file

from tensafe import failpoints
from tensafe_client import (
    Datum,
    DPMetrics,
    DPStepLostError,
    OptimStepResult,
    ServiceClient,
    TrainingClient,
    UnsupportedOptionError,
)

BATCH = [Datum([5, 6, 7, 8], [6, 7, 8, 9]), Datum([9, 8], [8, 7]), Datum([3, 4, 5], [4, 5, 6])]
DP = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "expected_batch_size": 3}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    with local_service(
        backend="torch", models=[f"tiny={model}"], directory=tmp_path_factory.mktemp("service")
    ) as service:
        yield service


@pytest.fixture
def client(running: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(running.target, api_key=running.api_key) as client:
        yield client


def test_a_private_run_outlives_its_worker(running: LocalService, client: ServiceClient):
    dp = DP | {"dataset_id": "outlives", "target_epsilon": 50.0}
    tc = client.create_training_client({"model_ref": "tiny", "seed": 1, "dp_config": dp})
    steps = []
    for number in range(4):
        gradient = tc.forward_backward(BATCH)
        steps.append(tc.optim_step(learning_rate=1e-2).result(timeout=120))
        assert set(gradient.result().metrics) == {"tokens"}
        assert gradient.result().outputs == {}
        if number == 1:
            (worker,) = worker_ids(running)
            os.kill(worker, signal.SIGKILL)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert all(step.dp.noise_applied for step in steps)
    spent = [step.dp.total_epsilon for step in steps]
    assert spent == sorted(spent)
    assert spent[0] > 0
    # Noise of √P·σC/3 on clipped sums of C·3/3 at most.
    assert all(step.grad_norm > 0.5 for step in steps)
    report = client.privacy_report(tc.run_id)
    assert report.steps == 4
    artifact = client.artifact(tc.save_state().artifact_id)
    assert "accumulator.safetensors" not in {file.name for file in artifact.files}


def test_the_noise_is_that_which_the_ledger_charges(client: ServiceClient, tmp_path: Path):
    """σ, C and the batch size on all their way: each of them wrong, the norm is too."""
    sigma, bound, expected = 40.0, 0.25, 5
    dp = {
        "dataset_id": "noise",
        "noise_multiplier": sigma,
        "max_grad_norm": bound,
        "expected_batch_size": expected,
    }
    tc = client.create_training_client({"model_ref": "tiny", "dp_config": dp})
    tc.forward_backward(BATCH)
    step = tc.optim_step().result(timeout=120)
    client.download_artifact(tc.save_state().artifact_id, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = sum(weight.numel() for weight in weights.values())
    # Clipped gradients add 3·C at most to noise of some 40·C·√P.
    scale = math.sqrt(numbers) * sigma * bound / expected
    assert step.grad_norm == pytest.approx(scale, rel=6 / math.sqrt(2 * numbers) + 0.01)


def test_the_server_draws_for_a_real_worker(client: ServiceClient):
    rows = [Datum([n, n + 1, n + 2], [n + 1, n + 2, n + 3]) for n in range(20)]
    dataset = client.upload_dataset(rows, "twenty")
    dp = {
        "sampling": "server_poisson",
        "dataset_id": dataset.id,
        "noise_multiplier": 1.0,
        "expected_batch_size": 5,
        "loss_noise_multiplier": 3.0,
    }
    tc = client.create_training_client(
        {"model_ref": "tiny", "seed": 1, "batch_size": 5, "dp_config": dp}
    )
    results = tc.train_private(4)
    assert tc.step == 4
    rates = []
    results += tc.train_private(2, learning_rate=lambda number: rates.append(number) or 1e-3)
    assert (tc.step, rates) == (6, [5, 6])
    assert [result.step for result in results] == [1, 2, 3, 4, 5, 6]
    assert all(result.dp.noised_loss is not None for result in results)
    assert all(result.dp.sampling_verified for result in results)


def test_a_forward_of_a_private_run_is_refused_and_of_its_artifact_is_not(client: ServiceClient):
    dp = DP | {"dataset_id": "evaluated"}
    tc = client.create_training_client({"model_ref": "tiny", "seed": 1, "dp_config": dp})
    tc.forward_backward(BATCH)
    tc.optim_step().result(timeout=120)
    saved: str = tc.save_state(include_optimizer=False).artifact_id
    with pytest.raises(UnsupportedOptionError, match="private metrics"):
        tc.forward(BATCH).result(timeout=120)
    plain = client.create_training_client({"model_ref": "tiny", "seed": 1})
    plain.load_state(saved)
    assert plain.forward(BATCH).result(timeout=120).loss > 0


UNSCORED = {
    "no row": [],
    "a mapping": {"input_ids": [[5, 6, 7]], "labels": [[-100, -100, -100]]},
    "datums": [Datum([5, 6], [6, 7], [0.0, 0.0]), Datum([3], [4], [0.0])],
}


@pytest.mark.parametrize("batch", UNSCORED.values(), ids=UNSCORED.keys())
def test_a_batch_in_which_nothing_is_scored_is_as_an_empty_one(client: ServiceClient, batch):
    """An error would tell whether the one row with a scored token is there."""
    shapes, spent = [], []
    for name, own in (("unscored", batch), ("scored", BATCH), ("none", None)):
        dp = DP | {"dataset_id": f"{name}-{len(batch)}", "target_epsilon": 50.0}
        tc = client.create_training_client({"model_ref": "tiny", "seed": 1, "dp_config": dp})
        if own is not None:
            gradient = tc.forward_backward(own).result(timeout=120)
            assert gradient.metrics["tokens"] == 0 or own
            shapes.append((set(gradient.metrics), gradient.outputs))
        step = tc.optim_step().result(timeout=120)
        assert step.dp is not None
        assert (step.step, step.applied, step.dp.noise_applied) == (1, True, True)
        spent.append((step.dp.total_epsilon, step.dp.steps_left))
    assert shapes == [({"tokens"}, {})] * 2
    assert len(set(spent)) == 1
    assert spent[0][0] > 0


def test_restored_weights_restore_no_budget(client: ServiceClient):
    """Into the run itself, into another one, as the beginning of a fork, and from a plain run."""
    dp = DP | {"dataset_id": "restored", "target_epsilon": 50.0}
    config = {"model_ref": "tiny", "seed": 1, "dp_config": dp}
    told: list[DPMetrics] = []

    def step(tc: TrainingClient) -> None:
        tc.forward_backward(BATCH)
        result = tc.optim_step(learning_rate=1e-2).result(timeout=120)
        assert result.dp is not None
        told.append(result.dp)

    tc = client.create_training_client(config)
    beginning = tc.save_state().artifact_id
    step(tc)
    after_one = tc.save_state().artifact_id
    step(tc)
    assert tc.load_state(after_one).step == 1
    step(tc)
    assert tc.load_state(beginning).step == 0
    step(tc)
    fork = client.create_training_client(config, from_artifact=after_one)
    step(fork)
    swept = client.create_training_client(config | {"lora_config": {"rank": 2}})
    step(swept)
    plain = client.create_training_client({"model_ref": "tiny", "seed": 1})
    plain.load_state(after_one)
    private = client.create_training_client(config)
    private.load_state(plain.save_state().artifact_id)
    step(private)
    assert [dp.steps_left for dp in told] == [told[0].steps_left - n for n in range(7)]
    assert [dp.total_epsilon for dp in told] == sorted({dp.total_epsilon for dp in told})
    report = client.privacy_report(fork.run_id)
    assert report.epsilon == pytest.approx(told[-1].total_epsilon, abs=1e-4)
    assert sum(line.uses for line in report.lines) == 7
    fresh = client.create_training_client(config | {"dp_config": dp | {"dataset_id": "other"}})
    fresh.load_state(after_one)
    step(fresh)
    assert told[-1].total_epsilon == pytest.approx(told[0].total_epsilon)


def test_files_of_the_service_do_not_hold_an_open_window(running: LocalService):
    names = {path.name for path in Path(running.directory).rglob("*") if path.is_file()}
    assert "accumulator.safetensors" not in names


@pytest.mark.slow
def test_a_step_whose_state_was_not_stored_is_lost_and_paid_for(tmp_path: Path):
    """The worker dies between noising a sum and storing what came of it."""
    model = save_tiny_model(tmp_path / "model")
    with (
        local_service(
            backend="torch",
            models=[f"tiny={model}"],
            directory=tmp_path / "service",
            environment={
                failpoints.VARIABLE: "mid-private-step=kill@2",
                failpoints.ONCE_VARIABLE: str(tmp_path),
            },
        ) as service,
        ServiceClient(service.target, api_key=service.api_key) as client,
    ):
        dp = DP | {"dataset_id": "lost", "target_epsilon": 50.0}
        tc = client.create_training_client({"model_ref": "tiny", "seed": 1, "dp_config": dp})
        ended: list[OptimStepResult | BaseException | None] = []
        for _ in range(3):
            tc.forward_backward(BATCH)
            update = tc.optim_step()
            ended.append(update.exception(timeout=120) or update.result())
        assert (tmp_path / "mid-private-step").exists()
    first, lost, third = ended
    assert isinstance(first, OptimStepResult)
    assert isinstance(lost, DPStepLostError)
    assert isinstance(third, OptimStepResult)
    assert (first.step, third.step) == (1, 2)
    assert first.dp is not None
    assert third.dp is not None
    # Two charges, though the run has moved by one step.
    assert first.dp.steps_left - third.dp.steps_left == 2
