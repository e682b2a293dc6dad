"""A process dies at a named point, once; nobody can tell afterwards, but by the clock."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness.cluster import Cluster, Process

from tensafe import failpoints
from tensafe_client import Datum, ServiceClient
from tensafe_server.store import migrations

STEPS = 6
CONFIG = {
    "model_ref": "tiny",
    "seed": 11,
    "deterministic": True,
    "lora_config": {"dropout": 0.1},
    "optimizer": {"learning_rate": 1e-2},
}
COORDINATORS_POINTS = [
    "before-commit",
    "after-commit-before-reply",
    "after-dispatch",
    "after-result-before-commit",
    "mid-snapshot",
]
WORKERS_POINTS = ["mid-step", "mid-snapshot-write"]
Outcome = tuple[list[float], list[int], str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("crash-points"), "--snapshot-steps", "1") as cluster:
        cluster.start()
        cluster.add_worker("--model", f"tiny={tiny_model}", "--dtype", "float32", "--threads", "1")
        cluster.workers[0].wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.target, api_key=cluster.new_tenant("crashing")) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(client: ServiceClient) -> Outcome:
    return train(client)


def train(client: ServiceClient) -> Outcome:
    """Losses, steps, and the adapter's checksum of a pipelined run that is saved at its end."""
    tc = client.create_training_client(CONFIG)
    futures, resolved = [], []
    for step in range(STEPS):
        tokens = np.random.default_rng(step).integers(3, 200, (2, 24))
        batch = [Datum(row[:-1], row[1:], weights=[1.0] * 23) for row in tokens]
        futures.append((tc.forward_backward(batch), tc.optim_step()))
        if step == STEPS // 2:
            futures[0][0].result(120)  # so that it takes more than one commit
    saving = tc.save_state_async()
    everything = [*(future for pair in futures for future in pair), saving]
    for future in everything:
        future.add_done_callback(resolved.append)
    losses = [passed.result(120).loss for passed, _ in futures]
    steps = [updated.result(120).step for _, updated in futures]
    files = client.artifact(saving.result(120).artifact_id).files
    assert sorted(map(id, resolved)) == sorted(map(id, everything)), "each resolves once"
    operations = client.operations(tc.run_id)
    assert [one.seq for one in operations] == list(range(len(everything), 0, -1))
    assert {one.state for one in operations} == {"succeeded"}
    assert [item.step for item in tc.metrics()] == steps
    return losses, steps, {file.name: file.sha256 for file in files}["adapter_model.safetensors"]


def restart_armed(process: Process, cluster: Cluster, point: str, hits: Path) -> None:
    armed = {failpoints.VARIABLE: f"{point}=kill@2", failpoints.ONCE_VARIABLE: str(hits)}
    process.stop()
    if process is cluster.coordinator:
        process.start(armed)
        process.wait_ready()
    else:
        cluster.start_worker(process, armed)
        process.wait_ready()


@pytest.mark.parametrize("point", COORDINATORS_POINTS + WORKERS_POINTS)
def test_a_death_at_this_point_changes_nothing(
    point: str, cluster: Cluster, client: ServiceClient, undisturbed: Outcome, tmp_path: Path
):
    process = cluster.coordinator if point in COORDINATORS_POINTS else cluster.workers[0]
    restart_armed(process, cluster, point, tmp_path)
    with Supervisor(cluster, process):
        assert train(client) == undisturbed
    assert (tmp_path / point).exists(), "the point was hit"


def test_a_death_in_a_migration_leaves_the_old_store_whole(tmp_path: Path):
    with Cluster(tmp_path / "home") as cluster:
        first = tmp_path / "first-migration"
        first.mkdir()
        shutil.copy(next(Path(migrations.__file__).parent.glob("0001_*.sql")), first)
        cluster.data.mkdir(parents=True)
        old = sqlite3.connect(cluster.data / "tensafe.db", isolation_level=None)
        migrations.migrate(old, first)
        old.execute("INSERT INTO tenants VALUES ('ten-1', 'old', 1)")
        tables = old.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        armed = {
            failpoints.VARIABLE: "mid-migration=kill",
            failpoints.ONCE_VARIABLE: str(first),
        }
        cluster.coordinator.start(armed)
        assert cluster.coordinator.wait_ended() == -9
        assert (first / "mid-migration").exists()
        assert migrations.schema_version(old) == 1
        assert old.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == tables
        old.close()
        cluster.start()
        cluster.coordinator.wait_said("from schema 1 to")
        assert cluster.new_tenant("new")
        assert cluster.stop() == [0]
        tenants = sqlite3.connect(cluster.data / "tensafe.db").execute("SELECT name FROM tenants")
        assert {name for (name,) in tenants} == {"old", "new"}


def test_every_point_is_documented():
    text = (Path(__file__).parents[2] / "docs/faults.md").read_text()
    for name, where in failpoints.POINTS.items():
        process, _, what = where.partition(": ")
        assert f"| `{name}` | {process} | {what} |" in text


def test_every_point_has_a_test():
    elsewhere = {
        "mid-migration",
        "mid-group",  # test_dying_groups.py
        # tests/privacy/test_crashes.py:
        *("mid-charge", "after-charge", "after-private-snapshot", "after-private-commit"),
        "mid-private-step",
    }
    assert {*COORDINATORS_POINTS, *WORKERS_POINTS} | elsewhere == set(failpoints.POINTS)


class Supervisor:
    """Starts a process again, unarmed, when it dies; insists that it died by SIGKILL."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self._cluster = cluster
        self._process = process
        self._statuses: list[int] = []

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._statuses.append(self._process.wait_ended())
        if self._process is self._cluster.coordinator:
            self._process.start()
        else:
            self._cluster.start_worker(self._process)

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert self._statuses == [-9]


@pytest.mark.parametrize("text", ["", "before-commit=kill", " mid-step=delay:0.5@2+ ; "])
def test_what_can_be_armed(text: str):
    assert len(failpoints.parse(text)) == bool(text)


@pytest.mark.parametrize(
    "text", ["nowhere=kill", "mid-step", "mid-step=die", "mid-step=kill@0", "mid-step=delay"]
)
def test_what_cannot_be_armed_is_refused(text: str):
    with pytest.raises(failpoints.FailpointSyntaxError, match=r"no failpoint|is not NAME"):
        failpoints.parse(text)


def test_counting_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    armed = failpoints.parse("mid-step=error@2+;before-commit=error@2")
    monkeypatch.setattr(failpoints, "_armed", armed)
    monkeypatch.setattr(failpoints, "_once", "")
    failpoints.hit("mid-step")
    for _ in range(2):
        with pytest.raises(failpoints.FailpointError):
            failpoints.hit("mid-step")
    monkeypatch.setattr(failpoints, "_once", str(tmp_path))
    failpoints.hit("before-commit")
    with pytest.raises(failpoints.FailpointError):
        failpoints.hit("before-commit")
    failpoints.hit("before-commit")
    assert [path.name for path in tmp_path.iterdir()] == ["before-commit"]


def test_an_armed_process_says_so(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(failpoints, "_armed", failpoints.parse("mid-step=kill"))
    failpoints.warn_if_armed(logging.getLogger("test"))
    assert "will fail on purpose at ['mid-step']" in caplog.text
