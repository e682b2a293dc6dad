"""Private steps from the client to the ledger, with a worker that keeps the protocol's promises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.cluster import Cluster
from harness.private_clients import BATCH, events, one_step, private_run
from harness.private_worker import PrivateWorker, VanishedError, is_kind

from tensafe_client import (
    BatchError,
    Datum,
    DPBudgetExceededError,
    DPStepLostError,
    ServiceClient,
    UnsupportedOptionError,
    WindowPoisonedError,
)
from tensafe_server.privacy.accounting import epsilon, most_uses
from tensafe_server.privacy.mechanisms import Mechanism, Terms


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        yield cluster


def test_each_step_is_reserved_made_durable_and_committed(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, target_epsilon=8.0)
    seen = []

    def look(stage: str, planned: Any) -> None:
        if is_kind(planned, "optim_step"):
            seen.append((stage, events(cluster)))

    worker.before = look
    results = [one_step(tc).result(60) for _ in range(2)]
    before = ["reserve", "commit"]
    assert seen == [
        *((stage, ["reserve"]) for stage in ("begin", "snapshot", "report")),
        *((stage, [*before, "reserve"]) for stage in ("begin", "snapshot", "report")),
    ]
    assert events(cluster) == before * 2
    first, second = (result.dp for result in results)
    assert first.noise_applied
    assert first.total_epsilon == pytest.approx(first.epsilon_spent)
    assert second.total_epsilon == pytest.approx(first.total_epsilon + second.epsilon_spent)
    assert (first.delta, first.sampling_verified) == (1e-5, False)
    assert first.steps_left == second.steps_left + 1
    terms = Terms(1e-5)
    assert second.total_epsilon == pytest.approx(epsilon({Mechanism(4.0): 2}, terms))


def test_what_is_told_beside_what_counts_stops_no_step(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    """Sampled releases under replace_one cannot be added up by RDP, nor by PLD if they differ."""
    attested = {"adjacency": "replace_one", "sample_rate": 0.1, "expected_batch_size": 2}
    runs = [
        private_run(client, **attested, accountant_type="rdp"),
        private_run(client, **attested),
        private_run(client, **attested, noise_multiplier=2.0),
    ]
    steps = [one_step(tc).result(60).dp for tc in runs]
    assert all(dp.total_epsilon > 0 for dp in steps)
    assert (steps[0].epsilon_if_poisson, steps[2].epsilon_if_poisson) == (None, None)
    reports = [client.privacy_report(tc.run_id) for tc in runs]
    assert {report.epsilon_if_poisson for report in reports} == {None}
    assert reports[1].epsilon == pytest.approx(steps[2].total_epsilon, rel=1e-4)


def test_the_owner_sees_nothing_that_was_not_noised(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    gradient = tc.forward_backward(BATCH).result(60)
    step = tc.optim_step().result(60)
    assert set(gradient.metrics) == {"tokens"}
    assert gradient.outputs == {}
    assert step.dp.num_clipped is None
    [row] = list(tc.metrics())
    assert set(row.values) == {"grad_norm", "tokens", "compute_ms", "queue_ms", "total_epsilon"}
    with pytest.raises(UnsupportedOptionError, match="private metrics only"):
        tc.forward(BATCH).result(60)


def test_a_prompts_log_probabilities_are_a_loss_too(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    with pytest.raises(UnsupportedOptionError, match="are its loss"):
        tc.sample([[1, 2, 3]], max_tokens=1, prompt_logprobs=True)


def test_raw_metrics_are_for_owners_who_ask_for_them(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, metrics="raw_to_owner")
    gradient = tc.forward_backward(BATCH).result(60)
    assert gradient.loss == 1.5
    assert len(gradient.logprobs) == 2
    assert tc.optim_step().result(60).dp.num_clipped == 3
    assert next(iter(tc.metrics())).loss == 1.0


def test_the_last_step_within_budget_is_made_and_the_next_refused(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    most = most_uses({}, Mechanism(4.0), 3.0, Terms(1e-5))
    assert 2 <= most <= 20
    tc = private_run(client, target_epsilon=3.0)
    steps = [one_step(tc) for _ in range(most)]
    assert steps[-1].result(60).dp.steps_left == 0
    held = worker.runs[tc.run_id]
    gradient = tc.forward_backward(BATCH)
    with pytest.raises(DPBudgetExceededError) as caught:
        tc.optim_step().result(60)
    assert caught.value.max_epsilon == 3.0
    assert caught.value.current_epsilon == pytest.approx(steps[-1].result().dp.total_epsilon)
    # Adapter, optimizer and accumulator are what they were.
    assert (held.step, len(held.applied)) == (most, most)
    assert [operation for operation, _ in held.window] == [gradient.operation_id]
    assert events(cluster) == ["reserve", "commit"] * most
    assert tc.refresh().step == most


def test_forks_sweeps_and_restored_weights_add_to_one_ledger(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    first = private_run(client, target_epsilon=3.0)
    spent = one_step(first).result(60).dp
    fork = private_run(client, target_epsilon=3.0)
    assert one_step(fork).result(60).dp.total_epsilon > spent.total_epsilon
    for _ in range(spent.steps_left - 1):
        one_step(fork).result(60)
    for tc in (first, fork, private_run(client, target_epsilon=3.0)):
        with pytest.raises(DPBudgetExceededError):
            one_step(tc).result(60)
    other = private_run(client, target_epsilon=3.0, dataset_id="another")
    assert one_step(other).result(60).applied


def test_two_runs_cannot_both_make_the_last_step(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    most = most_uses({}, Mechanism(4.0), 3.0, Terms(1e-5))
    runs = [private_run(client, target_epsilon=3.0) for _ in range(4)]
    for _ in range(most - 1):
        one_step(runs[0]).result(60)
    racing = [one_step(tc) for tc in runs]
    made = [future.exception(60) is None for future in racing]
    assert made.count(True) == 1
    assert events(cluster).count("commit") == most


def test_a_call_that_closes_no_window_gives_its_charge_back(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, {"gradient_accumulation_steps": 3})
    results = [one_step(tc, [Datum([n, 1], [1, n])]).result(60) for n in range(2, 8)]
    assert [result.applied for result in results] == [False, False, True] * 2
    assert [result.dp is not None for result in results] == [False, False, True] * 2
    assert events(cluster) == (["reserve", "release"] * 2 + ["reserve", "commit"]) * 2
    assert results[-1].dp.total_epsilon == pytest.approx(epsilon({Mechanism(4.0): 2}, Terms(1e-5)))


def test_a_poisoned_window_costs_nothing(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    tc.forward_backward(BATCH)
    with pytest.raises(BatchError):
        tc.forward_backward([7])  # type: ignore[list-item]
    with pytest.raises(WindowPoisonedError):
        tc.optim_step().result(60)
    assert events(cluster) == ["reserve", "release"]
    assert one_step(tc).result(60).applied


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_empty_batch_is_one_like_all_others(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, accumulated: int
) -> None:
    """It is noised and charged, and its shape tells nothing but what its sender knows."""
    tc = private_run(client, {"gradient_accumulation_steps": accumulated}, max_participation=1)
    for batch in ([], BATCH)[:accumulated]:
        gradient = tc.forward_backward(batch)
        step = tc.optim_step()
        assert gradient.result(60).metrics["tokens"] == sum(map(len, batch))
    assert step.result(60).applied
    [(_, window)] = worker.runs[tc.run_id].applied
    assert [units for _, units in window] == [[], [0, 1]][:accumulated]
    assert events(cluster)[-1] == "commit"
    free = client.create_training_client({"model_ref": "m"})
    with pytest.raises(BatchError, match="is empty"):
        free.forward_backward([])


def test_a_unit_adds_to_a_window_once(worker: PrivateWorker, client: ServiceClient) -> None:
    one, other = BATCH
    tc = private_run(client)
    tc.forward_backward([one, other, one])
    tc.forward_backward([other, Datum([9], [9])])
    tc.optim_step().result(60)
    one_step(tc, [one]).result(60)
    windows = [window for _, window in worker.runs[tc.run_id].applied]
    assert [[units for _, units in window] for window in windows] == [
        [[0, 1, 0], [-1, 0]],
        [[0]],
    ]


def test_a_unit_adds_to_as_many_steps_as_it_may(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, privacy_unit="unit_id", max_participation=2)
    for _ in range(3):
        batch = [Datum([1, 2], [2, 3], unit_id="a"), Datum([7], [8], unit_id="b")]
        one_step(tc, batch).result(60)
        one_step(tc, [Datum([5], [6], unit_id="a")]).result(60)
    windows = [window[0][1] for _, window in worker.runs[tc.run_id].applied]
    assert windows == [[0, 1], [0], [-1, 0], [-1], [-1, -1], [-1]]


def test_epsilon_counts_a_units_uses_and_stands_beside_the_attested_one(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    """q = 0.01, σ = 1: nothing is assumed about sampling but that a unit is used twice at most."""
    tc = private_run(client, noise_multiplier=1.0, sample_rate=0.01, max_participation=2)
    results = [one_step(tc).result(60).dp for _ in range(5)]
    terms = Terms(1e-5)
    twice = epsilon({Mechanism(1.0): 2}, terms)
    assert [round(dp.total_epsilon, 6) for dp in results[1:]] == [round(twice, 6)] * 4
    assert [dp.epsilon_spent for dp in results[2:]] == [0, 0, 0]
    attested = epsilon({Mechanism(1.0, 0.01): 5}, terms)
    assert results[-1].epsilon_if_poisson == pytest.approx(attested, abs=1e-4)
    assert not results[-1].sampling_verified


def test_units_are_named_where_they_are_protected(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client, privacy_unit="unit_id")
    with pytest.raises(BatchError, match="unit_ids has 0 entries"):
        tc.forward_backward(BATCH).result(60)
    other = private_run(client)
    with pytest.raises(UnsupportedOptionError, match="unit_ids"):
        other.forward_backward([Datum([1], [2], unit_id="a")]).result(60)


def test_a_ledger_protects_units_of_one_kind(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    """A bound on each example's part is none on a person's, so that the two do not add up."""
    people = [Datum([1, 2], [2, 3], unit_id="a"), Datum([7], [8], unit_id="a")]
    early = private_run(client, privacy_unit="unit_id")
    one_step(private_run(client)).result(60)
    with pytest.raises(UnsupportedOptionError, match="protects examples") as caught:
        private_run(client, privacy_unit="unit_id")
    assert caught.value.metadata["field"] == "config.dp.privacy_unit"
    with pytest.raises(UnsupportedOptionError, match="protects examples"):
        one_step(early, people).result(60)
    assert events(cluster) == ["reserve", "commit"]
    other = private_run(client, privacy_unit="unit_id", dataset_id="people")
    assert one_step(other, people).result(60).applied
    with pytest.raises(UnsupportedOptionError, match="protects unit ids"):
        private_run(client, dataset_id="people")


@pytest.mark.parametrize("loss", ["ppo", "dpo", "kl", "my_own"])
def test_a_loss_that_may_mix_examples_is_refused_by_its_name(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient, loss: str
) -> None:
    tc = private_run(client)
    with pytest.raises(UnsupportedOptionError, match=f"'{loss}'.*use cross_entropy"):
        tc.forward_backward(BATCH, loss_fn=loss).result(60)
    with pytest.raises(WindowPoisonedError):
        tc.optim_step().result(60)
    assert events(cluster) == ["reserve", "release"]


@pytest.mark.parametrize("reduction", ["token_mean"])
def test_what_mixes_examples_is_refused(
    worker: PrivateWorker, client: ServiceClient, reduction: str
) -> None:
    tc = private_run(client)
    with pytest.raises(UnsupportedOptionError, match="lets one example move"):
        tc.forward_backward(BATCH, reduction=reduction).result(60)
    with pytest.raises(UnsupportedOptionError, match="the client chooses the batches"):
        tc.private_step().result(60)
    public = client.create_training_client({"model_ref": "m"})
    with pytest.raises(UnsupportedOptionError, match="not private"):
        public.private_step().result(60)


def test_a_step_that_is_lost_with_its_worker_is_spent_and_not_made_again(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    one_step(tc).result(60)

    def vanish(stage: str, planned: Any) -> None:
        if is_kind(planned, "optim_step") and stage == "snapshot":
            worker.vanish()
            raise VanishedError

    worker.before = vanish
    gradient = tc.forward_backward(BATCH)
    lost = tc.optim_step()
    behind = tc.forward_backward([Datum([8], [9])])
    gradient.result(60)
    worker.wait_planned(4)
    second = PrivateWorker(cluster.target, cluster.worker_key)
    with pytest.raises(DPStepLostError):
        lost.result(60)
    behind.result(60)
    assert tc.optim_step().result(60).step == 2
    assert events(cluster) == ["reserve", "commit", "reserve", "lose", "reserve", "commit"]
    # It began at the state after the first step; of the lost one's window nothing is left.
    [(_, window)] = second.runs[tc.run_id].applied
    assert [operation for operation, _ in window] == [behind.operation_id]
    assert second.assignments[0].snapshot_id
    assert [one.void for one in second.planned if is_kind(one, "optim_step")] == [True, False]
    second.close()


def test_a_step_whose_state_its_worker_cannot_store_is_lost_like_that(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    one_step(tc).result(60)
    second = PrivateWorker(cluster.target, cluster.worker_key)
    over = threading.Event()

    def give_up(stage: str, planned: Any) -> None:
        if is_kind(planned, "optim_step") and stage == "snapshot":
            worker.give_up(tc.run_id, "WORKER_DISK_FULL")
            over.wait(60)
            raise VanishedError

    worker.before = give_up
    tc.forward_backward(BATCH)
    with pytest.raises(DPStepLostError):
        tc.optim_step().result(60)
    assert one_step(tc).result(60).step == 2
    assert events(cluster) == ["reserve", "commit", "reserve", "lose", "reserve", "commit"]
    over.set()
    second.close()


def test_a_worker_that_was_only_cut_off_answers_for_its_step(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    """The answer was lost on its way: the step is neither made again nor charged again."""
    tc = private_run(client)

    def cut(stage: str, planned: Any) -> None:
        if is_kind(planned, "optim_step") and stage == "report":
            worker.before = lambda stage, planned: None
            worker.cut()
            raise VanishedError

    worker.before = cut
    tc.forward_backward(BATCH)
    step = tc.optim_step()
    worker.wait_planned(2)
    worker.join()
    worker.connect()
    assert step.result(60).step == 1
    assert len(worker.runs[tc.run_id].applied) == 1
    first, second = (one for one in worker.planned if is_kind(one, "optim_step"))
    assert first.charge == second.charge
    assert events(cluster) == ["reserve", "commit"]


def test_a_charged_step_is_not_cancelled(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    """What was sent behind it belongs to the next window already."""
    tc = private_run(client)
    reached, go = threading.Event(), threading.Event()

    def wait(stage: str, planned: Any) -> None:
        if is_kind(planned, "optim_step") and stage == "begin":
            reached.set()
            go.wait(30)

    worker.before = wait
    tc.forward_backward(BATCH)
    step = tc.optim_step()
    assert reached.wait(30)
    threading.Timer(0.2, go.set).start()
    assert not step.cancel()
    assert step.result(60).applied


def test_a_step_cancelled_before_it_was_sent_leaves_window_and_budget_alone(
    cluster: Cluster, worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    reached, go = threading.Event(), threading.Event()

    def wait(stage: str, planned: Any) -> None:
        if is_kind(planned, "forward_backward") and stage == "report":
            reached.set()
            go.wait(30)

    worker.before = wait
    gradient = tc.forward_backward(BATCH)
    step = tc.optim_step()
    assert reached.wait(30)
    assert step.cancel()
    go.set()
    gradient.result(60)
    worker.before = lambda stage, planned: None
    tc.forward_backward([BATCH[0], Datum([11], [12])]).result(60)
    assert tc.optim_step().result(60).step == 1
    [(_, window)] = worker.runs[tc.run_id].applied
    assert [units for _, units in window] == [[0, 1], [-1, 0]]
    assert events(cluster).count("commit") == 1


def test_a_private_run_cannot_be_verified_by_replay(
    worker: PrivateWorker, client: ServiceClient
) -> None:
    tc = private_run(client)
    one_step(tc).result(60)
    with pytest.raises(UnsupportedOptionError, match="noise was drawn once"):
        client.verify_run(tc.run_id)


def test_a_unit_of_an_open_window_is_known_after_a_restart(cluster: Cluster) -> None:
    """It has added to the window already, and may not add again."""
    worker = PrivateWorker(cluster.target, cluster.worker_key, comes_back=True)
    with ServiceClient(cluster.target, api_key=cluster.new_tenant("restarted")) as client:
        tc = private_run(client, max_participation=1)
        own = [Datum([1, 2], [2, 3])]
        tc.forward_backward(own).result(30)
        cluster.coordinator.kill()
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()
        for _ in range(2):
            tc.forward_backward(own).result(60)
            tc.optim_step().result(60)
        windows = [[units for _, units in window] for _, window in worker.runs[tc.run_id].applied]
        assert windows == [[[0], [-1]], [[-1]]]
    worker.close()
