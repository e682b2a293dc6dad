"""Crash anything, anytime: three tenants train on, to the same bits.

`make chaos` is the long form; SEED replays a run's choices, KILLS says how many processes die.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from fault.chaos_audit import audit
from fault.chaos_driver import Driver
from fault.chaos_evidence import kept_on_failure
from fault.chaos_workload import TENANTS, Story, Trainer
from harness.cluster import Cluster
from harness.proxy import TcpProxy

from tensafe_client import ServiceClient

SHORT_KILLS = 5
LONG_KILLS = 30
# So little memory that a worker sets every run aside but the one that it is at.
WORKER = ("--dtype", "float32", "--threads", "1", "--run-memory-mib", "0.01")


@pytest.mark.timeout(600)
def test_a_few_kills(tmp_path: Path, tiny_model: Path):
    chaos(tmp_path, tiny_model, seed=20, kills=SHORT_KILLS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_kills(tmp_path: Path, tiny_model: Path):
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    chaos(tmp_path, tiny_model, seed=seed, kills=int(os.environ.get("KILLS") or LONG_KILLS))


def chaos(home: Path, tiny_model: Path, *, seed: int, kills: int) -> None:
    print(f"\nchaos: replay with `make chaos SEED={seed} KILLS={kills}`")
    cluster = Cluster(home, "--snapshot-steps", "8")
    with kept_on_failure(cluster, f"seed-{seed}-kills-{kills}"), cluster:
        live_through(cluster, tiny_model, seed=seed, kills=kills)


def live_through(cluster: Cluster, tiny_model: Path, *, seed: int, kills: int) -> None:
    progress = threading.Condition()
    cluster.start()
    worker_proxies = [TcpProxy(cluster.port) for _ in range(2)]
    client_proxies = [TcpProxy(cluster.port) for _ in TENANTS]
    for proxy in worker_proxies:
        cluster.add_worker("--model", f"tiny={tiny_model}", *WORKER, port=proxy.port)
    for worker in cluster.workers:
        worker.wait_ready()
    clients = [
        ServiceClient(f"127.0.0.1:{proxy.port}", api_key=cluster.new_tenant(tenant.name))
        for tenant, proxy in zip(TENANTS, client_proxies, strict=True)
    ]
    trainers = [
        Trainer(tenant, client, progress) for tenant, client in zip(TENANTS, clients, strict=True)
    ]
    driver = Driver(seed, cluster, trainers, client_proxies, worker_proxies, progress)
    for trainer in trainers:
        trainer.start()
    try:
        driver.run(kills)
    finally:
        print(driver.report())
    for trainer in trainers:
        trainer.finish()
    stories = [trainer.join() for trainer in trainers]
    aside = sum(worker.log.count("set run ") for worker in cluster.workers)
    print(f"{driver.kills} kills; steps: {[story.steps for story in stories]}")
    print(f"{sum(story.large for story in stories)} results in files; set aside: {aside}")
    assert aside

    undisturbed = undisturbed_stories(clients, stories, progress)
    for ours, theirs in zip(stories, undisturbed, strict=True):
        assert ours.results == theirs.results, "the same bits"
    for client in clients:
        client.close()
    for worker in cluster.workers:
        worker.wait_ready()
    cluster.stop()
    for story in (*stories, *undisturbed):
        audit(cluster.data / "tensafe.db", story)
    for proxy in (*worker_proxies, *client_proxies):
        proxy.close()


def undisturbed_stories(
    clients: list[ServiceClient], stories: list[Story], progress: threading.Condition
) -> list[Story]:
    """The same trainings, as long, with nothing killed."""
    trainers = [
        Trainer(tenant, client, progress) for tenant, client in zip(TENANTS, clients, strict=True)
    ]
    for trainer, story in zip(trainers, stories, strict=True):
        trainer.start(story.steps)
    return [trainer.join() for trainer in trainers]
