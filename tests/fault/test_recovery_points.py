"""Recovery points: a crash costs the operations after the newest one, whatever became of it."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from harness.cluster import Cluster
from local_service import isolated_environment, tensafe_command

from tensafe.v1 import operations_pb2 as ops
from tensafe_client import Datum, EmptyWindowError, ServerError, ServiceClient, TrainingClient

CONFIG = {
    "model_ref": "tiny",
    "seed": 11,
    "lora_config": {"dropout": 0.1},
    "optimizer": {"learning_rate": 1e-2},
    "gradient_accumulation_steps": 2,
    "deterministic": True,
}
STEPS = 10  # optim_step calls; every second one applies
WORKER = ["--dtype", "float32", "--threads", "1"]
RESTORED = re.compile(r"restoring (\S+) under epoch (\d+) from (.+) and (\d+) operations after it")


def batch(step: int) -> list[Datum]:
    tokens = np.random.default_rng(step).integers(3, 200, (2, 24))
    return [Datum(row[:-1], row[1:], weights=[1.0] * 23) for row in tokens]


def train(tc: TrainingClient, steps: range) -> list[float]:
    futures = [(tc.forward_backward(batch(step)), tc.optim_step()) for step in steps]
    for _, updated in futures:
        updated.result(120)
    return [passed.result(120).loss for passed, _ in futures]


def adapter(client: ServiceClient, tc: TrainingClient) -> str:
    """Checksum of the weights as they are now."""
    files = client.artifact(tc.save_state(include_optimizer=False).artifact_id).files
    return {file.name: file.sha256 for file in files}["adapter_model.safetensors"]


class House:
    """A cluster whose runs get a snapshot after every update."""

    def __init__(self, home: Path, model: Path, *options: str) -> None:
        self.cluster = Cluster(home, "--snapshot-steps", "1", *options)
        self.cluster.start()
        self.cluster.add_worker("--model", f"tiny={model}", *WORKER)
        self.cluster.workers[0].wait_ready()
        self.key = self.cluster.new_tenant("t")

    @property
    def blobs(self) -> Path:
        return self.cluster.data / "blobs"

    def until_snapshot(self, run_id: str, seq: int) -> None:
        """Returns when the run has a snapshot after this seq."""
        self.cluster.coordinator.wait_said(f"of {run_id} at seq {seq}, ")

    def restored(self, run_id: str) -> list[tuple[str, int]]:
        """Each recovery of the run: from what, and how many operations were sent after it."""
        found = RESTORED.findall(self.cluster.coordinator.log)
        return [(point, int(count)) for run, _, point, count in found if run == run_id]

    def rows(self, query: str, *values: object) -> list[tuple]:
        connection = sqlite3.connect(self.cluster.data / "tensafe.db")
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()

    def snapshots(self, run_id: str) -> list[Path]:
        """Directories of the run's snapshots, the newest first."""
        query = "SELECT id FROM snapshots WHERE run_id = ? ORDER BY seq DESC"
        return [self.blobs / "snapshots" / name for (name,) in self.rows(query, run_id)]

    def kill_worker(self, while_dead: Callable[[], None] = lambda: None) -> None:
        [worker] = self.cluster.workers
        worker.kill()
        while_dead()
        self.cluster.start_worker(worker)
        worker.wait_ready()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("snapshots"), tiny_model)
    with house.cluster:
        yield house


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[ServiceClient]:
    with ServiceClient(house.cluster.target, api_key=house.key) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(client: ServiceClient) -> tuple[list[float], str]:
    tc = client.create_training_client(CONFIG)
    return train(tc, range(STEPS)), adapter(client, tc)


def half_way(client: ServiceClient, house: House) -> tuple[TrainingClient, list[float]]:
    """A run after three of its updates, with snapshots of the last two, and a window half open."""
    tc = client.create_training_client(CONFIG)
    losses = []
    for update in range(3):
        losses += train(tc, range(2 * update, 2 * update + 2))
        house.until_snapshot(tc.run_id, 4 * update + 4)
    losses += train(tc, range(6, 7))
    return tc, losses


def test_a_recovery_begins_at_the_newest_snapshot(client, house, undisturbed):
    tc, losses = half_way(client, house)
    assert tc.refresh().snapshot_seq == 12
    house.kill_worker()
    losses += train(tc, range(7, STEPS))
    assert (losses, adapter(client, tc)) == undisturbed
    [(point, count)] = house.restored(tc.run_id)
    assert point.endswith("at seq 12")
    assert count == 2
    assert client.run(tc.run_id).replay_mismatches == 0
    assert "replay mismatch" not in house.cluster.coordinator.log


def flip_a_bit(snapshot: Path) -> None:
    path = snapshot / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def tear(snapshot: Path) -> None:
    path = snapshot / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_the_manifest(snapshot: Path) -> None:
    (snapshot / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage", [flip_a_bit, pytest.param(lose_the_manifest, marks=pytest.mark.slow)]
)
def test_a_damaged_snapshot_is_noticed_and_the_one_before_it_is_used(
    client, house, undisturbed, damage
):
    tc, losses = half_way(client, house)
    newest, before = house.snapshots(tc.run_id)
    house.kill_worker(lambda: damage(newest))
    losses += train(tc, range(7, STEPS))
    assert (losses, adapter(client, tc)) == undisturbed
    [(point, count)] = house.restored(tc.run_id)
    assert before.name in point
    assert count == 6
    log = house.cluster.coordinator.log.splitlines()
    assert any("is not used" in line and newest.name in line for line in log)
    with ServiceClient(house.cluster.target, api_key=house.cluster._admin_key) as operator:
        assert operator.admin.storage().damaged_snapshots >= 1
    if damage is flip_a_bit:
        assert not newest.exists()


@pytest.mark.slow
def test_one_that_is_whole_and_cannot_be_loaded_is_passed_over(client, house, undisturbed):
    tc, losses = half_way(client, house)
    newest, before = house.snapshots(tc.run_id)

    def replace() -> None:
        """Other bytes, with all the sums that belong to them."""
        import hashlib

        content = b"not a tensor"
        (newest / "optimizer.safetensors").write_bytes(content)
        path = newest / "manifest.json"
        manifest = json.loads(path.read_text())
        for file in manifest["files"]:
            if file["name"] == "optimizer.safetensors":
                file["size_bytes"] = len(content)
                file["sha256"] = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(manifest))
        connection = sqlite3.connect(house.cluster.data / "tensafe.db")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        connection.execute("UPDATE snapshots SET sha256 = ? WHERE id = ?", (digest, newest.name))
        connection.commit()
        connection.close()

    house.kill_worker(replace)
    losses += train(tc, range(7, STEPS))
    assert (losses, adapter(client, tc)) == undisturbed
    assert [newest.name in point for point, _ in house.restored(tc.run_id)] == [True, False]
    assert before.name in house.restored(tc.run_id)[1][0]


@pytest.mark.slow
def test_a_saved_state_newer_than_all_snapshots_is_where_it_begins(client, house, undisturbed):
    tc, losses = half_way(client, house)
    saved = tc.save_state()
    house.kill_worker()
    losses += train(tc, range(7, STEPS))
    assert losses == undisturbed[0]
    assert house.restored(tc.run_id) == [(f"artifact {saved.artifact_id} at seq 15", 0)]


def test_without_any_recovery_point_its_operations_fail_and_say_so(client, house):
    tc, _ = half_way(client, house)

    def damage_all() -> None:
        for snapshot in house.snapshots(tc.run_id):
            tear(snapshot)

    house.kill_worker(damage_all)
    error = tc.forward_backward(batch(7)).exception(60)
    assert isinstance(error, ServerError)
    assert error.reason == "RUN_STATE_LOST"
    assert tc.run_id in str(error)
    # Other runs are not touched.
    assert train(client.create_training_client(CONFIG), range(1))


def test_a_worker_that_still_has_the_state_needs_no_replay(client, house, undisturbed):
    tc, losses = half_way(client, house)
    house.cluster.coordinator.kill()
    house.cluster.coordinator.start()
    house.cluster.coordinator.wait_ready()
    losses += train(tc, range(7, STEPS))
    assert (losses, adapter(client, tc)) == undisturbed
    assert house.restored(tc.run_id) == []
    house.until_snapshot(tc.run_id, 20)  # under the new stream, too


def test_specs_before_the_oldest_snapshot_kept_are_gone_and_rows_are_not(client, house):
    tc, _ = half_way(client, house)
    train(tc, range(7, STEPS))
    house.until_snapshot(tc.run_id, 20)
    house.cluster.coordinator.wait_said(f"pruned {tc.run_id} up to seq 16")
    rows = house.rows(
        "SELECT seq, spec IS NULL AND spec_ref IS NULL, state, result IS NOT NULL FROM operations"
        " WHERE run_id = ? ORDER BY seq",
        tc.run_id,
    )
    assert rows == [(seq, int(seq <= 16), 3, 1) for seq in range(1, 21)]
    assert len(house.snapshots(tc.run_id)) == 2
    report = client.verify_run(tc.run_id)
    assert report.reproduces
    assert (report.pruned, report.from_seq, report.to_seq) == (True, 16, 20)
    assert (report.replayed, report.exact) == (4, 4)


def test_a_saved_run_goes_on_in_another_to_the_same_bits(client, house, undisturbed):
    """Dropout on, a window half open, in a run that was made with another seed."""
    tc, losses = half_way(client, house)
    saved = tc.save_state()
    other = client.create_training_client({**CONFIG, "seed": 99})
    train(other, range(3))
    assert other.load_state(saved.artifact_id).step == 3
    assert losses + train(other, range(7, STEPS)) == undisturbed[0]
    assert adapter(client, other) == undisturbed[1]


def tamper(house: House, run_id: str, seq: int) -> None:
    """Changes the loss that the log has for an operation, by one part in 10¹²."""
    [(operation_id, data)] = house.rows(
        "SELECT id, result FROM operations WHERE run_id = ? AND seq = ?", run_id, seq
    )
    result = ops.OperationResult.FromString(data)
    result.forward_backward.metrics[0].value *= 1 + 1e-12
    connection = sqlite3.connect(house.cluster.data / "tensafe.db")
    query = "UPDATE operations SET result = ? WHERE id = ?"
    connection.execute(query, (result.SerializeToString(), operation_id))
    connection.commit()
    connection.close()


def test_a_run_is_verified_beside_its_own_work(client, house):
    tc = client.create_training_client(CONFIG)
    train(tc, range(3))
    tc.forward_backward([Datum([1, 2], [2, 3], weights=[0.0, 1.0])]).result(60)
    tc.optim_step().result(60)
    with pytest.raises(EmptyWindowError):
        [tc.optim_step() for _ in range(2)][1].result(60)
    progress: list[tuple[int, int]] = []
    report = client.verify_run(tc.run_id, on_progress=lambda *seen: progress.append(seen))
    start = report.from_seq
    assert report.reproduces
    assert report.to_seq == 10
    assert (report.replayed, report.exact) == (10 - start, 10 - start)
    assert [replayed for replayed, _ in progress] == list(range(1, 10 - start + 1))
    assert client.run(tc.run_id).step == 2
    # What the check took on is given back; the run itself goes on.
    assert train(tc, range(2))


def test_a_log_that_was_changed_does_not_reproduce(client, house):
    tc = client.create_training_client(CONFIG)
    train(tc, range(3))
    tamper(house, tc.run_id, 5)
    report = client.verify_run(tc.run_id)
    assert not report.reproduces
    assert report.mismatches == 1
    assert report.details[0].seq == 5
    assert report.details[0].difference.startswith("loss ")
    command = ["--target", house.cluster.target, "--api-key", house.key, "runs", "verify"]
    ran = subprocess.run(
        tensafe_command(*command, tc.run_id, "--json"),
        env=isolated_environment(house.cluster.home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 11, ran.stderr
    assert json.loads(ran.stdout)["details"][0]["seq"] == 5
    # A recovery says so too, in the log and on the run; the future keeps its first result.
    house.until_snapshot(tc.run_id, 4)
    house.kill_worker()
    train(tc, range(3, 4))
    house.cluster.coordinator.wait_said(f"replay mismatch in run {tc.run_id}: operation ")
    assert client.run(tc.run_id).replay_mismatches == 1
    with ServiceClient(house.cluster.target, api_key=house.cluster._admin_key) as operator:
        [seen] = [run for run in operator.admin.runs() if run.id == tc.run_id]
        assert seen.replay_mismatches == 1
        assert operator.admin.verify_run(tc.run_id).details == report.details


def test_the_disk_is_accounted_for(client, house):
    tc, _ = half_way(client, house)
    directories = house.snapshots(tc.run_id)
    assert len(directories) == 2
    client.delete_run(tc.run_id)
    house.cluster.coordinator.wait_said(f"pruned {tc.run_id} up to seq 14")
    assert house.snapshots(tc.run_id) == []
    assert not [directory for directory in directories if directory.exists()]
    assert house.rows("SELECT COUNT(*) FROM operations WHERE run_id = ?", tc.run_id) == [(14,)]
    with ServiceClient(house.cluster.target, api_key=house.cluster._admin_key) as operator:
        use = operator.admin.storage()
    assert use.log.count == house.rows("SELECT COUNT(*) FROM operations")[0][0]
    assert use.log.size_bytes > use.log_free_bytes >= 0
    assert use.snapshots.count > 0
    assert use.snapshots.size_bytes > 10_000 * use.snapshots.count
