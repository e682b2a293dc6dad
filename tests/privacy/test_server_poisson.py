"""Training whose batches the server draws: uploaded, drawn, told to nobody, charged, reported."""

from __future__ import annotations

import itertools
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from harness.cluster import Cluster
from harness.private_clients import BATCH, events, ledger, one_step, private_run
from harness.private_worker import PrivateWorker, VanishedError, is_kind

from tensafe.v1 import worker_pb2
from tensafe.wire.status import from_status
from tensafe_client import (
    DatasetInUseError,
    DatasetNotFoundError,
    Datum,
    DPBudgetExceededError,
    InvalidArgumentError,
    InvalidDatasetError,
    ServiceClient,
    TenSafeError,
    TokenOutOfRangeError,
    TrainingClient,
    UnsupportedOptionError,
)
from tensafe_server.privacy.accounting import epsilon, most_uses
from tensafe_server.privacy.mechanisms import Mechanism, Terms

numbers = itertools.count(100)


@pytest.fixture
def rows() -> list[Datum]:
    """Forty rows that no other test has: equal content would be one dataset in each tenant."""
    mark = next(numbers)
    return [Datum([n + 1, mark], [mark, n + 1]) for n in range(40)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("poisson")) as cluster:
        cluster.start()
        yield cluster


def poisson_run(client: ServiceClient, dataset: str, **dp: Any) -> TrainingClient:
    return private_run(
        client, dataset_id=dataset, **{"sampling": "server_poisson", "sample_rate": 0.25} | dp
    )


def drawn(worker: PrivateWorker) -> list[set[int]]:
    return [{row[0] for row in rows} for rows in worker.drawn.values()]


def test_whole_private_training(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows, "forty")
    assert (dataset.examples, dataset.unit_ids, dataset.tokens) == (40, None, 80)
    tc = poisson_run(client, dataset.id, target_epsilon=8.0)
    assert tc.config.dp_config.expected_batch_size == 10
    seen = []
    results = tc.train_private(12, learning_rate=lambda step: 0.1 / step, on_step=seen.append)
    assert seen == results
    assert [result.step for result in results] == list(range(1, 13))
    batches = drawn(worker)
    assert len(batches) == 12
    assert len({frozenset(batch) for batch in batches}) > 6
    assert 4 < sum(map(len, batches)) / 12 < 16
    spent = epsilon({Mechanism(4.0, 0.25): 12}, Terms(1e-5))
    assert results[-1].dp.total_epsilon == pytest.approx(spent, abs=1e-4)
    assert results[-1].dp.sampling_verified
    assert results[-1].dp.epsilon_if_poisson is None
    assert events(cluster, dataset.id) == ["reserve", "commit"] * 12


def test_nobody_is_told_who_was_drawn_nor_how_many(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = poisson_run(client, dataset.id)
    tc.train_private(3)
    for row in tc.metrics():
        assert set(row.values) == {"grad_norm", "queue_ms", "total_epsilon"}
    for operation in client.operations(tc.run_id):
        assert operation.compute_ms == 0
    log = cluster.coordinator.log
    assert "drawn" not in log
    assert "units" not in log


def test_a_draw_is_for_the_worker_and_the_charge_that_it_was_made_for(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    answers = []

    def ask(stage: str, planned: Any) -> None:
        if stage != "begin":
            return
        for worker_id, charge_id in (
            (worker._worker_id, "chg-other"),
            ("worker-other", planned.charge.id),
        ):
            request = worker_pb2.FetchPrivateBatchRequest(
                worker_id=worker_id, operation_id=planned.operation_id, charge_id=charge_id
            )
            try:
                list(worker._stub.FetchPrivateBatch(request, metadata=worker._metadata))
                answers.append("rows")
            except grpc.RpcError as error:
                answers.append(from_status(rpc_status.from_call(error)).reason)

    worker.before = ask
    tc = poisson_run(client, client.upload_dataset(rows).id)
    assert tc.train_private(1)[0].applied
    assert answers == ["STALE_ASSIGNMENT"] * 2


def test_units_are_drawn_and_sent_whole(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    people = [Datum([n + 1], [0], unit_id=f"person {n % 5}") for n in range(30)]
    dataset = client.upload_dataset(people)
    assert dataset.unit_ids == 5
    tc = poisson_run(client, dataset.id, privacy_unit="unit_id", sample_rate=0.5)
    assert tc.config.dp_config.expected_batch_size == 2.5
    tc.train_private(6)
    for batch in worker.drawn.values():
        found = {row[0] - 1 for row in batch}
        assert found == {n for n in range(30) if n % 5 in {one % 5 for one in found}}


def test_steps_within_budget_are_made_and_the_next_refused(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    most = most_uses({}, Mechanism(4.0, 0.25), 1.0, Terms(1e-5))
    assert 2 < most < 60
    tc = poisson_run(client, dataset.id, target_epsilon=1.0)
    results = []
    with pytest.raises(DPBudgetExceededError):
        tc.train_private(most + 3, on_step=results.append)
    assert len(results) == most
    assert results[-1].dp.steps_left == 0
    assert events(cluster, dataset.id) == ["reserve", "commit"] * most
    again = client.upload_dataset(list(reversed(rows)))  # the same content has the same ledger
    assert again.id == dataset.id
    with pytest.raises(DPBudgetExceededError):
        poisson_run(client, again.id, target_epsilon=1.0).train_private(1)


def test_noise_is_computed_for_the_steps_that_are_planned(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = client.create_training_client(
        {
            "model_ref": "m",
            "max_steps": 5,
            "dp_config": {
                "dataset_id": dataset.id,
                "sampling": "server_poisson",
                "target_epsilon": 2.0,
                "expected_batch_size": 10,
            },
        }
    )
    sigma = tc.config.dp_config.noise_multiplier
    assert 1.9 < epsilon({Mechanism(sigma, 0.25): 5}, Terms(1e-5)) <= 2.0
    assert tc.train_private(5)[-1].dp.total_epsilon == pytest.approx(2.0, abs=2e-3)


def test_a_failure_that_tells_of_the_draw_is_paid_for(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = poisson_run(client, dataset.id)
    # The second one does not depend on who was drawn, so that the worker's word counts.
    for reason, told in (("OUT_OF_MEMORY", "INTERNAL"), ("MAX_STEPS_REACHED",) * 2):
        worker.refuses = reason
        with pytest.raises(TenSafeError) as failed:
            tc.private_step().result(60)
        assert failed.value.reason == told
    worker.refuses = ""
    assert tc.train_private(1)[0].step == 1
    assert events(cluster, dataset.id) == [
        *("reserve", "lose", "reserve", "release", "reserve", "commit")
    ]


def test_rows_that_came_back_in_another_order_are_drawn_whole(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    rows = [Datum(range(n, 2 * n), range(n), weights=[1.0] * n) for n in range(1, 9)]
    for order in (rows, rows[::-1]):
        dataset = client.upload_dataset(order)
        tc = poisson_run(client, dataset.id, sample_rate=0.5)
        tc.train_private(4)
        tc.delete()
        client.delete_dataset(dataset.id)
    drawn_rows = [row for batch in worker.drawn.values() for row in batch]
    assert drawn_rows
    assert all(row in [list(range(n, 2 * n)) for n in range(1, 9)] for row in drawn_rows)


def test_a_lost_step_is_spent_and_drawn_anew(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = poisson_run(client, dataset.id)
    tc.train_private(1)

    def vanish(stage: str, planned: Any) -> None:
        if is_kind(planned, "private_step") and stage == "snapshot":
            worker.vanish()
            raise VanishedError

    worker.before = vanish
    step = tc.private_step()
    worker.join()
    second = PrivateWorker(cluster.target, cluster.worker_key)
    assert step.result(60).step == 2
    assert worker.drawn[step.operation_id] != second.drawn[step.operation_id]
    assert events(cluster, dataset.id) == [
        *("reserve", "commit", "reserve", "lose", "reserve", "commit")
    ]
    spent = epsilon({Mechanism(4.0, 0.25): 3}, Terms(1e-5))
    assert step.result().dp.total_epsilon == pytest.approx(spent, abs=1e-4)
    second.close()


def test_uploads_are_kept_for_their_owner_only(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    [folder] = (cluster.data / "blobs" / "datasets").glob(f"*/{dataset.id}")
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with (
        ServiceClient(cluster.target, api_key=cluster.new_tenant("stranger")) as other,
        pytest.raises(DatasetNotFoundError),
    ):
        other.dataset(dataset.id)
    client.delete_dataset(dataset.id)
    client.delete_dataset(dataset.id)
    assert not folder.exists()
    with pytest.raises(DatasetNotFoundError):
        poisson_run(client, dataset.id)


def test_a_dataset_that_a_run_draws_from_stays(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = poisson_run(client, dataset.id)
    with pytest.raises(DatasetInUseError):
        client.delete_dataset(dataset.id)
    tc.delete()
    client.delete_dataset(dataset.id)
    assert client.datasets() == []


def test_datasets_are_there_after_a_restart(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": [n], "target_tokens": [n]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = client.upload_dataset(path)
    tc = poisson_run(client, dataset.id)
    tc.train_private(1)
    cluster.coordinator.kill()
    cluster.coordinator.start()
    cluster.coordinator.wait_ready()
    assert client.upload_dataset(path) == dataset
    second = PrivateWorker(cluster.target, cluster.worker_key)
    assert tc.train_private(1)[0].step == 2
    second.close()


def test_what_is_wrong_with_an_upload_is_named(
    worker: PrivateWorker, client: ServiceClient, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"tokens": [1], "target_tokens": [1]}\n{"tokens": [1], "target_tokens": []}\n')
    with pytest.raises(InvalidDatasetError, match="line 2: target_tokens has 0 entries"):
        client.upload_dataset(path)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        client.upload_dataset(tmp_path / "missing.jsonl")


def test_a_dataset_of_another_tokenizer_is_refused(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    dataset = client.upload_dataset([Datum([5000], [1])])
    with pytest.raises(TokenOutOfRangeError, match="another tokenizer"):
        poisson_run(client, dataset.id, sample_rate=1.0)


def test_the_client_sends_no_batches_to_a_run_whose_server_draws(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    tc = poisson_run(client, client.upload_dataset(rows).id)
    with pytest.raises(UnsupportedOptionError, match="train_private"):
        tc.forward_backward(rows[:1]).result(60)
    with pytest.raises(UnsupportedOptionError, match="train_private"):
        tc.optim_step().result(60)


def test_the_report_says_what_was_verified(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    tc = poisson_run(client, dataset.id, target_epsilon=8.0)
    tc.train_private(4)
    report = client.privacy_report(tc.run_id)
    spent = epsilon({Mechanism(4.0, 0.25): 4}, Terms(1e-5))
    assert report.epsilon == pytest.approx(spent)
    assert report.headline.startswith(f"privacy: ε = {spent:.4f} at δ = 1e-05")
    assert (report.steps, report.lost_steps, report.target_epsilon) == (4, 0, 8.0)
    assert (report.sampling, report.sampling_verified) == ("server_poisson", True)
    assert (report.sample_rate, report.noise_multiplier, report.max_grad_norm) == (0.25, 4.0, 1.0)
    assert (report.accountant_used, report.adjacency) == ("pld", "add_or_remove_one")
    assert report.accountant_version.startswith("dp-accounting 0.")
    assert (report.dataset_id, report.dataset_units) == (dataset.id, 40)
    assert report.dataset_sha256 == dataset.sha256
    assert report.metrics == "private"
    assert "CSPRNG" in report.rng
    entries = ledger(cluster, dataset.id)
    assert (report.ledger_entries, report.ledger_sha256) == (8, entries[-1].sha256)
    assert [(line.uses, line.sample_rate) for line in report.lines] == [(4, 0.25)]
    caveats = " ".join(report.caveats)
    for words in ("Mironov", "tuning not included", "timing", "not encrypted", "its hash"):
        assert words in caveats
    text = str(report)
    assert text.startswith(report.headline)
    for words in (
        report.ledger_sha256,
        "enforced:",
        "attested:",
        "caveats:",
        "4 of server_poisson",
    ):
        assert words in text


def test_the_report_of_attested_batches_has_both_epsilons(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, noise_multiplier=1.0, sample_rate=0.01, max_participation=2)
    for _ in range(5):
        one_step(tc).result(60)
    report = client.privacy_report(tc.run_id)
    terms = Terms(1e-5)
    assert report.epsilon == pytest.approx(epsilon({Mechanism(1.0): 2}, terms))
    assert report.epsilon_if_poisson == pytest.approx(epsilon({Mechanism(1.0, 0.01): 5}, terms))
    assert not report.sampling_verified
    assert "no assumption about sampling" in report.headline
    attested = " ".join(report.attested)
    assert "dataset_id" in attested
    assert "tokens and weights were made of that example alone" in attested
    assert "decided without a look at other examples" in attested
    assert "trained on this data outside of this ledger" in attested
    assert "sampling_verified: false" in attested
    assert any("at most 2 steps" in text for text in report.enforced)


def test_test_mode_marks_every_report_on_the_dataset(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    honest = private_run(client)
    one_step(honest).result(60)
    assert not client.privacy_report(honest.run_id).test_mode
    seeded = private_run(client, test_seed=7)
    one_step(seeded).result(60)
    for tc in (honest, seeded):
        report = client.privacy_report(tc.run_id)
        assert report.test_mode
        assert report.headline == "privacy: none (test mode)"


def test_raw_metrics_mark_every_report_on_the_dataset(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    """Also if the run that told them has made no step, and is deleted."""

    def says_so(tc: TrainingClient) -> bool:
        return any("raw metrics" in text for text in client.privacy_report(tc.run_id).caveats)

    quiet, elsewhere = private_run(client), private_run(client, dataset_id="another")
    one_step(quiet).result(60)
    assert not says_so(quiet)
    raw = private_run(client, metrics="raw_to_owner")
    raw.forward_backward(BATCH).result(60)
    assert says_so(raw)
    assert says_so(quiet)
    client.delete_run(raw.run_id)
    assert says_so(quiet)
    assert not says_so(elsewhere)


def test_changed_parameters_are_added_up_by_rdp_and_said(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    dataset = client.upload_dataset(rows)
    for sigma in (4.0, 5.0):
        poisson_run(client, dataset.id, noise_multiplier=sigma).train_private(2)
    tc = poisson_run(client, dataset.id)
    tc.train_private(1)
    report = client.privacy_report(tc.run_id)
    assert (report.accountant, report.accountant_used) == ("pld", "rdp")
    assert any("RDP" in text for text in report.caveats)
    mixed = {Mechanism(4.0, 0.25): 3, Mechanism(5.0, 0.25): 2}
    assert report.epsilon == pytest.approx(epsilon(mixed, Terms(1e-5)))


def test_hardly_any_noise_costs_the_coordinator_nothing_and_has_an_upper_bound(
    worker: PrivateWorker, client: ServiceClient, rows: list[Datum]
) -> None:
    """A distribution of its losses would take tens of gigabytes."""
    tc = poisson_run(client, client.upload_dataset(rows).id, noise_multiplier=0.001)
    tc.train_private(2)
    report = client.privacy_report(tc.run_id)
    assert (report.accountant, report.accountant_used) == ("pld", "rdp")
    assert 1e5 < report.epsilon < 1e7
    assert any("upper bound" in text for text in report.caveats)


def test_a_run_that_is_not_private_has_no_report(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = client.create_training_client({"model_ref": "m"})
    with pytest.raises(UnsupportedOptionError, match="not private"):
        client.privacy_report(tc.run_id)
