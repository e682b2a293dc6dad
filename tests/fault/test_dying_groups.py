"""A worker dies in the middle of a group: each member goes on as if it had been alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.cluster import Cluster, wait_accepted

from tensafe import failpoints
from tensafe.v1 import operations_pb2 as ops
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient

STEPS = 5
TIMEOUT_S = 120.0
GRADIENTS, UPDATES = ops.OPERATION_KIND_FORWARD_BACKWARD, ops.OPERATION_KIND_OPTIM_STEP
CONFIGS = [
    {"model_ref": "tiny", "seed": 21, "lora_config": {"rank": 4, "dropout": 0.1}},
    {"model_ref": "tiny", "seed": 22, "lora_config": {"rank": 8}, "optimizer": {"name": "sgd"}},
    {"model_ref": "tiny", "seed": 23, "gradient_accumulation_steps": 2},
    {"model_ref": "tiny", "seed": 24, "lora_config": {"dropout": 0.1}, "deterministic": True},
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("groups"), "--snapshot-steps", "2") as cluster:
        cluster.start()
        cluster.add_worker("--model", f"tiny={tiny_model}", "--dtype", "float32", "--threads", "1")
        cluster.workers[0].wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def clients(cluster: Cluster) -> Iterator[list[ServiceClient]]:
    """One of each tenant."""
    opened = [
        ServiceClient(cluster.target, api_key=cluster.new_tenant(f"tenant-{number}"))
        for number in range(len(CONFIGS))
    ]
    yield opened
    for client in opened:
        client.close()


@dataclass
class Training:
    """A run, all of its operations sent at once, and how often each has resolved."""

    client: ServiceClient
    tc: TrainingClient
    passes: list[OperationFuture[Any]]
    updates: list[OperationFuture[Any]]
    saving: OperationFuture[Any]
    resolved: list[int]

    @classmethod
    def begin(cls, client: ServiceClient, number: int) -> Training:
        tc = client.create_training_client(CONFIGS[number])
        passes, updates = [], []
        for step in range(STEPS):
            # Two batches of different lengths: one that counted twice would change their mean.
            passes += [tc.forward_backward(batch(number, step, part)) for part in range(2)]
            updates.append(tc.optim_step(learning_rate=5e-3))
        training = cls(client, tc, passes, updates, tc.save_state_async(), [])
        for future in (*passes, *updates, training.saving):
            future.add_done_callback(lambda done: training.resolved.append(done.seq))
        return training

    def outcome(self) -> tuple[list[float], str]:
        """Losses and the adapter's checksum, after a look at everything that counts."""
        losses = [future.result(TIMEOUT_S).loss for future in self.passes]
        results = [future.result(TIMEOUT_S) for future in self.updates]
        files = self.client.artifact(self.saving.result(TIMEOUT_S).artifact_id).files
        count = len(losses) + len(results) + 1
        assert sorted(self.resolved) == list(range(1, count + 1)), "each resolves once"
        operations = self.client.operations(self.tc.run_id)
        assert [one.seq for one in operations] == list(range(count, 0, -1))
        assert {one.state for one in operations} == {"succeeded"}
        applied = [result.step for result in results if result.applied]
        assert applied == list(range(1, len(applied) + 1))
        assert [item.step for item in self.tc.metrics()] == applied
        run = self.tc.refresh()
        assert (run.step, run.replay_mismatches) == (len(applied), 0)
        return losses, {file.name: file.sha256 for file in files}["adapter_model.safetensors"]


def batch(number: int, step: int, part: int) -> list[Datum]:
    draw = np.random.default_rng((number, step, part))
    tokens = draw.integers(3, 200, (1, 9 + 12 * part))
    return [Datum(row[:-1], row[1:], weights=[1.0] * (len(row) - 1)) for row in tokens]


@pytest.fixture(scope="module")
def alone(clients: list[ServiceClient]) -> list[tuple[list[float], str]]:
    return [Training.begin(client, number).outcome() for number, client in enumerate(clients)]


def held_by_the_dead(cluster: Cluster) -> list[tuple[str, int]]:
    """(run, kind) of each operation that the loss of its worker is counted against."""
    connection = sqlite3.connect(cluster.data / "tensafe.db")
    try:
        return connection.execute(
            "SELECT run_id, kind FROM attempts JOIN operations ON id = subject"
        ).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "pass_number",
    [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 8, 9))],
)
def test_every_member_goes_on_as_if_alone(
    cluster: Cluster,
    clients: list[ServiceClient],
    alone: list[tuple[list[float], str]],
    pass_number: int,
):
    """Of each step two passes are gradients, in a window that is open, and one is the updates;
    which is the third depends on how many runs the worker had when it began."""
    [worker] = cluster.workers
    lives = worker.starts
    worker.stop()
    trainings = [Training.begin(client, number) for number, client in enumerate(clients)]
    for client in clients:
        wait_accepted(client)
    cluster.start_worker(worker, {failpoints.VARIABLE: f"mid-group=kill@{pass_number}"})
    assert worker.wait_ended() == -9
    cluster.coordinator.wait_said(f" left; it held {len(clients)} runs", count=lives)
    members = held_by_the_dead(cluster)
    kinds = {kind for _, kind in members}
    assert len(kinds) == 1
    assert kinds <= {GRADIENTS, UPDATES}
    assert len({run for run, _ in members}) == len(members) >= 2
    cluster.start_worker(worker)
    for number, training in enumerate(trainings):
        losses, adapter = training.outcome()
        np.testing.assert_allclose(losses, alone[number][0], rtol=1e-4)
        if CONFIGS[number].get("deterministic"):
            assert (losses, adapter) == alone[number]
