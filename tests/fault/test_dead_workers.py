"""Workers that freeze, hang, crash or are cut off: their runs move, and nothing counts twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.faulty_fleet import FaultyCluster, batch, train, wait_running
from harness.faulty_worker import BREAKING_SEED, GATE, GATED, HANG, HANGING_SEED
from harness.proxy import TcpProxy

SILENCE_S = "1.5"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FaultyCluster]:
    with FaultyCluster(tmp_path, "--worker-silence-s", SILENCE_S, "--grace-s", "5") as cluster:
        cluster.start()
        yield cluster


def test_a_frozen_worker_loses_its_runs_and_commits_nothing_afterwards(fleet: FaultyCluster):
    with fleet.client() as client:
        frozen = fleet.add_faulty_worker(gated_save=True)
        tc = client.create_training_client({"model_ref": "any", "seed": 1})
        before = train(tc, 2)
        saved = tc.save_state_async()
        wait_running(client, saved)  # written, not yet uploaded
        fleet.add_faulty_worker()
        frozen.signal(signal.SIGSTOP)
        artifact_id = saved.result(60).artifact_id  # by the other worker
        fleet.coordinator.wait_said("is taken for dead: nothing was heard from it")
        after = train(tc, 2)
        fleet.open_gate(frozen)
        frozen.signal(signal.SIGCONT)
        # It went on with what it had, and was refused; then it came back empty-handed.
        fleet.coordinator.wait_said(f"refused an upload of {artifact_id} under assignment 1")
        frozen.wait_said("connected to", count=2)
        client.download_artifact(artifact_id, fleet.home / "downloaded")
        assert (fleet.home / "downloaded" / "saved_by.txt").read_text() == "worker-1"
        assert before + after + train(tc, 1) == [
            (step, pytest.approx(2.5 - 0.01 * step)) for step in range(1, 6)
        ]
        assert [item.step for item in tc.metrics()] == [1, 2, 3, 4, 5]
        assert len(client.artifacts()) == 1


def test_a_worker_that_is_cut_off_again_and_again_is_not_held_for_dead(fleet: FaultyCluster):
    proxy = TcpProxy(fleet.port)
    try:
        with fleet.client() as client:
            worker = fleet.add_faulty_worker(port=proxy.port)
            tc = client.create_training_client({"model_ref": "any", "seed": 4})
            waiting = tc.forward_backward(batch(GATE))
            for cuts in range(2, 6):
                wait_running(client, waiting)
                proxy.cut()
                worker.wait_said("connected to", count=cuts)
            fleet.open_gate(worker)
            assert waiting.result(60).loss == pytest.approx(2.49)
            assert tc.optim_step().result(60).step == 1
            assert worker.starts == 1
    finally:
        proxy.close()


def test_a_worker_that_hears_nothing_connects_anew(fleet: FaultyCluster):
    proxy = TcpProxy(fleet.port)
    try:
        with fleet.client() as client:
            worker = fleet.add_faulty_worker(port=proxy.port)
            tc = client.create_training_client({"model_ref": "any", "seed": 5})
            assert train(tc, 1)
            proxy.drop_replies()
            worker.wait_said("heard nothing from the coordinator")
            proxy.cut()
            assert [step for step, _ in train(tc, 2)] == [2, 3]
    finally:
        proxy.close()


def test_a_sample_that_is_cut_off_again_and_again_is_no_poison(fleet: FaultyCluster):
    """It belongs to no run, so that no assignment tells that its worker was never lost."""
    proxy = TcpProxy(fleet.port)
    try:
        with fleet.client() as client:
            worker = fleet.add_faulty_worker(port=proxy.port)
            sampler = client.create_training_client({"model_ref": "any", "seed": 6})
            saved = sampler.save_state()
            waiting = sampler.sample_async([GATED], artifact=saved.artifact_id)
            for cuts in range(2, 7):
                wait_running(client, waiting)
                proxy.cut()
                worker.wait_said("connected to", count=cuts)
            fleet.open_gate(worker)
            assert waiting.result(60)
            assert worker.starts == 1
    finally:
        proxy.close()


LIMITS = ("--operation-limit-s", "1", "--token-limit-ms", "0")


@pytest.mark.parametrize("hangs", ["operation", "taking on a run"])
def test_a_worker_whose_watchdog_fails_is_told_to_end(fleet: FaultyCluster, hangs: str):
    """Known from its heartbeats: its runs move, it ends, and what hung is to blame for it."""
    with fleet.client() as client:
        for _ in range(2):
            fleet.add_faulty_worker(*LIMITS, watchdog=False)
        others = [client.create_training_client({"model_ref": "any"}) for _ in range(2)]
        for other in others:
            assert train(other, 1)
        if hangs == "operation":
            tc = client.create_training_client({"model_ref": "any", "seed": 7})
            waiting = tc.forward_backward(batch(HANG))
        else:
            tc = client.create_training_client({"model_ref": "any", "seed": HANGING_SEED})
            waiting = tc.forward_backward(batch())
        deaths = 2 if hangs == "operation" else 3
        for _ in range(deaths):
            death = fleet.next_death()
            assert death is not None
            dead, status = death
            assert status == 75, dead.log[-2000:]
            dead.wait_said("hangs (")
            dead.wait_said("hang_for_ever")  # the stacks
            fleet.revive(dead)
        assert fleet.coordinator.log.count("hangs and is told to end") == deaths
        error = waiting.exception(60)
        assert error is not None
        assert "when its worker was lost, so it is not tried again" in str(error)
        for other in others:
            assert [step for step, _ in train(other, 2)] == [2, 3]
        if hangs == "operation":
            assert tc.optim_step().exception(60).reason == "WINDOW_POISONED"  # type: ignore[union-attr]
            assert [step for step, _ in train(tc, 2)] == [1, 2]


def test_a_worker_whose_executor_fails_ends(fleet: FaultyCluster):
    """It would go on to say that it is well, and execute nothing."""
    with fleet.client() as client:
        worker = fleet.add_faulty_worker()
        broken = client.create_training_client({"model_ref": "any", "seed": BREAKING_SEED})
        other = client.create_training_client({"model_ref": "any", "seed": 8})
        assert train(broken, 1)
        assert train(other, 1)
        client.delete_run(broken.run_id)
        waiting = other.forward_backward(batch())
        assert fleet.next_death() == (worker, 75)
        worker.wait_said("the executor has failed")
        worker.wait_said("nobody knows why")
        fleet.revive(worker)
        assert waiting.result(60).loss
        assert other.optim_step().result(60).step == 2
