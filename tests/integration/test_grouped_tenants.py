"""Runs of several tenants on one worker: executed together, and none the worse for it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from uuid import uuid4

import numpy as np
import pytest
from harness.processes import wait_until_gone, worker_pids
from harness.tiny_model import save_tiny_model
from local_service import LocalService, local_service

from tensafe_client import Datum, ServiceClient, TrainingClient

STEPS = 8
PASSES = re.compile(r"(\d+) operations of several runs in (\d+) passes, at most (\d+) in one")


@pytest.fixture(scope="module")
def grouping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service with a real model, and a wait for company that a busy machine keeps to."""
    model = save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
    with local_service(
        backend="torch",
        models=[f"tiny={model}"],
        options=["--dtype", "float32", "--company-wait-ms", "20"],
        directory=tmp_path_factory.mktemp("grouping"),
    ) as service:
        yield service


def config(number: int, **options) -> dict:
    return {
        "model_ref": "tiny",
        "seed": 10 + number,
        "lora_config": {"rank": 4 << number % 3, "dropout": 0.1},
        "optimizer": {"learning_rate": 5e-3},
        **options,
    }


def batch(number: int, step: int) -> list[Datum]:
    length = 12 + 8 * (number % 3)
    tokens = np.random.default_rng((number, step)).integers(3, 200, (2, length + 1))
    weights = [1.0] * length
    return [Datum(tokens=row[:-1], target_tokens=row[1:], weights=weights) for row in tokens]


def losses(number: int, tc: TrainingClient, *, pipelined: bool) -> list[float]:
    """Trains; pipelined, or waiting for each step as a loop does that looks at its loss."""
    futures = []
    for step in range(STEPS):
        futures.append((tc.forward_backward(batch(number, step)), tc.optim_step()))
        if not pipelined:
            futures[-1][1].result(120)
    return [passed.result(120).loss for passed, updated in futures if updated.result(120).applied]


def together(clients: Sequence[TrainingClient], *, pipelined: bool) -> list[list[float]]:
    with ThreadPoolExecutor(len(clients)) as pool:
        jobs = [
            pool.submit(losses, number, tc, pipelined=pipelined)
            for number, tc in enumerate(clients)
        ]
        return [job.result() for job in jobs]


@pytest.fixture
def clients(grouping: LocalService) -> Iterator[list[ServiceClient]]:
    """Clients of four tenants."""
    keys = [grouping.api_key]
    with ExitStack() as stack:
        admin = stack.enter_context(ServiceClient(grouping.target, api_key=grouping.admin_key))
        for number in range(1, 4):
            tenant = admin.admin.create_tenant(f"tenant-{number}-{uuid4().hex}")
            keys.append(admin.admin.create_key(tenant.id).secret)
        yield [stack.enter_context(ServiceClient(grouping.target, api_key=key)) for key in keys]


def grouped(service: LocalService) -> tuple[int, int, int]:
    """Operations executed with others so far, their passes, and the largest of those."""
    found = [tuple(map(int, numbers)) for numbers in PASSES.findall(service.log)]
    return sum(n[0] for n in found), sum(n[1] for n in found), max((n[2] for n in found), default=0)


def test_tenants_that_train_at_once_learn_as_if_alone(clients: list[ServiceClient]):
    alone = [
        losses(number, client.create_training_client(config(number)), pipelined=True)
        for number, client in enumerate(clients)
    ]
    for pipelined in (True, False):
        runs = [client.create_training_client(config(n)) for n, client in enumerate(clients)]
        for expected, found in zip(alone, together(runs, pipelined=pipelined), strict=True):
            assert expected[0] != expected[-1]
            np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_deterministic_run_gives_its_own_bits_beside_others(
    grouping: LocalService, clients: list[ServiceClient]
):
    own = config(0, deterministic=True)
    alone = losses(0, clients[0].create_training_client(own), pipelined=True)
    runs = [clients[0].create_training_client(own)]
    runs += [client.create_training_client(config(n)) for n, client in enumerate(clients) if n]
    beside, *_ = together(runs, pipelined=True)
    assert beside == alone
    # Its operations tell under what they have these bits; those that had company tell nothing.
    told = [
        {operation.fingerprint for operation in client.operations(run_id=run.run_id)}
        for client, run in zip(clients, runs, strict=True)
    ]
    (own,) = told[0]
    assert f"fingerprint {own}: " in grouping.log
    assert any("" in others for others in told[1:])


def test_a_run_whose_steps_fail_takes_no_other_with_it(clients: list[ServiceClient]):
    alone = losses(0, clients[0].create_training_client(config(0)), pipelined=True)
    ending = clients[3].create_training_client(config(3, max_steps=2))
    runs = [client.create_training_client(config(n)) for n, client in enumerate(clients[:3])]
    steps = []
    for step in range(STEPS):
        ending.forward_backward(batch(3, step))
        steps.append(ending.optim_step())
    first, *_ = together(runs, pipelined=True)
    np.testing.assert_allclose(first, alone, rtol=1e-4)
    faults = [step.exception(60) for step in steps]
    assert faults[:2] == [None, None]
    assert all("max_steps" in str(fault) for fault in faults[2:])


def test_operations_did_find_company(grouping: LocalService):
    """Of everything above: what the worker tells when it ends."""
    kill = worker_pids(grouping)
    os.kill(kill[0], signal.SIGTERM)
    wait_until_gone(kill[0])
    operations, passes, largest = grouped(grouping)
    assert largest >= 3
    # Asked for by three or four at a time: 320 operations. Not all find company.
    assert operations > 100
    assert passes < 0.6 * operations
