"""What a report says where other runs, a test seed or no noise are part of the sum."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.cluster import Cluster
from harness.private_clients import ledger, one_step, private_run
from harness.private_worker import PrivateWorker

from tensafe_client import (
    ChecksumMismatchError,
    Datum,
    PrivacyReport,
    ServiceClient,
    TrainingClient,
)
from tensafe_client.cli.output import to_jsonable

ROWS = [Datum([n + 1, 50], [50, n + 1]) for n in range(40)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("reports")) as cluster:
        cluster.start()
        yield cluster


def drawn_run(client: ServiceClient, dataset_id: str, **dp: object) -> TrainingClient:
    dp = {"sampling": "server_poisson", "sample_rate": 0.25} | dp
    return private_run(client, dataset_id=dataset_id, **dp)


def says(texts: tuple[str, ...], *words: str) -> bool:
    return any(all(word in text for word in words) for text in texts)


def test_what_other_runs_have_assumed_is_part_of_a_report(client: ServiceClient) -> None:
    """Their releases are part of its ε."""
    dataset = client.upload_dataset(ROWS).id
    drawn = drawn_run(client, dataset)
    drawn.train_private(1)
    alone = client.privacy_report(drawn.run_id)
    assert alone.sampling_verified
    assert alone.headline.endswith("; batches drawn by the server")
    assert not says(alone.attested, "near-duplicates")

    chosen = private_run(client, dataset_id=dataset, max_participation=3)
    one_step(chosen).result(60)
    report = client.privacy_report(drawn.run_id)
    assert report.sampling == "server_poisson"
    assert not report.sampling_verified
    assert report.headline.endswith("in part, no assumption about the others")
    assert says(report.enforced, "probability 0.25")
    assert says(report.enforced, f"at most 3 steps of run {chosen.run_id}", "other runs")
    assert says(report.attested, "near-duplicates")
    assert says(report.attested, "other runs on this dataset", "made of that example alone")
    assert says(report.attested, "dataset_id")

    other = client.privacy_report(chosen.run_id)
    assert not other.sampling_verified
    assert other.headline == report.headline
    assert says(other.enforced, "the server drew each batch", "other runs on this dataset")
    assert says(other.enforced, f"at most 3 steps of run {chosen.run_id}")
    assert says(other.attested, "other datasets of the tenant")
    assert says(other.caveats, "longest row")
    assert [step.dp.sampling_verified for step in drawn.train_private(1)] == [False]


def test_a_bound_is_that_of_its_run(client: ServiceClient) -> None:
    bound, free = private_run(client, target_epsilon=2.0), private_run(client)
    one_step(bound).result(60)
    report = client.privacy_report(bound.run_id)
    assert says(report.enforced, "no step of this run has taken the ledger past ε 2")
    assert not says(report.caveats, "past this run")
    for _ in range(5):
        one_step(free).result(60)
    report = client.privacy_report(bound.run_id)
    assert report.epsilon > 2.0
    assert says(report.enforced, "other runs have bounds of their own, or none")
    assert says(report.caveats, "past this run's target ε 2: steps of other runs took it there")
    assert not says(report.enforced, "no step was made")
    one_step(private_run(client, noise_multiplier=0.0)).result(60)
    report = client.privacy_report(bound.run_id)
    assert report.headline == "privacy: none (no noise, ε is infinite)"
    assert says(report.caveats, "past this run's target ε 2: steps of other runs took it there")


def test_a_seeded_run_is_one_before_its_first_step(client: ServiceClient) -> None:
    report = client.privacy_report(private_run(client, test_seed=7).run_id)
    assert (report.lines, report.test_mode) == ((), True)
    assert report.headline == "privacy: none (test mode)"


def test_without_noise_epsilon_is_told_as_infinite(client: ServiceClient) -> None:
    tc = private_run(client, noise_multiplier=0.0)
    assert client.privacy_report(tc.run_id).headline == "privacy: none (no noise, ε is infinite)"
    one_step(tc).result(60)
    report = client.privacy_report(tc.run_id)
    assert report.headline == "privacy: none (no noise, ε is infinite)"
    assert json.loads(json.dumps(to_jsonable(report), allow_nan=False))["epsilon"] == "Infinity"
    assert "epsilon                 inf\n" in str(report)


def test_a_delta_that_no_distribution_tells_of_is_no_lack_of_noise(client: ServiceClient) -> None:
    tc = drawn_run(client, client.upload_dataset(ROWS).id, target_delta=1e-30, target_epsilon=20.0)
    assert tc.train_private(1)[0].dp.total_epsilon < 20.0
    report = client.privacy_report(tc.run_id)
    assert report.headline.startswith(f"privacy: ε = {report.epsilon:.4f} at δ = 1e-30")
    assert report.accountant_used == "rdp"
    assert says(report.caveats, "upper bound")


def test_lines_say_whom_they_protect(client: ServiceClient) -> None:
    people = private_run(client, privacy_unit="unit_id", dataset_id="people")
    one_step(people, [Datum([1], [2], unit_id="a")]).result(60)
    one_step(tc := private_run(client)).result(60)

    def units(report: PrivacyReport) -> list[str]:
        assert f"unit {report.lines[0].privacy_unit}" in str(report)
        return [line.privacy_unit for line in report.lines]

    assert units(client.privacy_report(people.run_id)) == ["unit_id"]
    assert units(client.privacy_report(tc.run_id)) == ["example"]


@pytest.mark.parametrize(
    ("damage", "events_left"),
    [
        ("DELETE FROM dp_ledger WHERE position > 2", 2),
        ("UPDATE dp_ledger SET line = 'cheaper' WHERE position = 3", 6),
    ],
    ids=["cut", "changed"],
)
def test_what_is_no_longer_in_a_ledger_comes_back_as_no_budget(
    tmp_path: Path, damage: str, events_left: int
) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        key = cluster.new_tenant("t")
        worker = PrivateWorker(cluster.target, cluster.worker_key, comes_back=True)
        with ServiceClient(cluster.target, api_key=key) as client:
            tc = private_run(client, target_epsilon=8.0)
            for _ in range(3):
                one_step(tc).result(60)
            cluster.coordinator.kill()
            connection = sqlite3.connect(cluster.data / "tensafe.db")
            connection.execute("DROP TRIGGER dp_ledger_is_never_cut")
            connection.execute("DROP TRIGGER dp_ledger_is_never_changed")
            connection.execute(damage)
            connection.commit()
            connection.close()
            cluster.coordinator.start()
            cluster.coordinator.wait_ready()
            with pytest.raises(ChecksumMismatchError, match="from entry 3 on"):
                client.privacy_report(tc.run_id)
            with pytest.raises(ChecksumMismatchError, match="from entry 3 on"):
                one_step(tc).result(60)
            with pytest.raises(ChecksumMismatchError, match="from entry 3 on"):
                private_run(client)
            assert one_step(private_run(client, dataset_id="another")).result(60).applied
            assert len(ledger(cluster)) == events_left
        worker.close()
