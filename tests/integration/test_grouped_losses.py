"""Tenants that minimise different losses, planned into one pass: each gets what it gets alone."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from harness.processes import wait_until_gone, worker_pids
from harness.tiny_model import save_tiny_model
from local_service import LocalService, local_service

from tensafe_client import Datum, ServiceClient, TrainingClient

STEPS = 4
LENGTHS = (11, 7, 16, 11)
PASSES = re.compile(r"(\d+) operations of several runs in (\d+) passes, at most (\d+) in one")


def policy(rng: np.random.Generator, size: int) -> dict[str, Any]:
    return {"logprobs": rng.normal(-5.55, 0.3, size), "advantages": rng.normal()}


def nothing(rng: np.random.Generator, size: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Tenant:
    """What one minimises. `compares`: with an artifact of its own."""

    loss: str
    config: dict[str, Any] = field(default_factory=dict)
    reduction: str | None = None
    inputs: Callable[[np.random.Generator, int], dict[str, Any]] = nothing
    compares: bool = False


TENANTS = (
    Tenant("cross_entropy", {"label_smoothing": 0.1}),
    Tenant("ppo", {"entropy_coef": 0.01, "kl_coef": 0.1}, inputs=policy),
    Tenant("gspo", {"clip_high": 1.3}, reduction="sequence_mean", inputs=policy),
    Tenant("dpo", {"beta": 0.3}),
    Tenant("kl", {"direction": "forward"}, reduction="sum", compares=True),
    Tenant("cispo", {}, reduction="sum", inputs=policy),
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model = save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
    with local_service(
        backend="torch",
        models=[f"tiny={model}"],
        options=["--dtype", "float32", "--company-wait-ms", "0"],
        directory=tmp_path_factory.mktemp("losses"),
    ) as running:
        yield running


@pytest.fixture
def clients(service: LocalService) -> Iterator[list[ServiceClient]]:
    """A client of each tenant."""
    with ExitStack() as stack:
        admin = stack.enter_context(ServiceClient(service.target, api_key=service.admin_key))
        found = []
        for number, tenant in enumerate(TENANTS):
            made = admin.admin.create_tenant(f"{tenant.loss}-{number}")
            key = admin.admin.create_key(made.id).secret
            found.append(stack.enter_context(ServiceClient(service.target, api_key=key)))
        yield found


def new_run(client: ServiceClient, number: int) -> TrainingClient:
    return client.create_training_client(
        {
            "model_ref": "tiny",
            "seed": 20 + number,
            "lora_config": {"rank": 2 << number % 3, "dropout": 0.1},
            "optimizer": {"learning_rate": 1e-2},
        }
    )


def batch(number: int, step: int) -> list[Datum]:
    rng = np.random.default_rng((number, step))
    found = []
    for length in LENGTHS:
        tokens = rng.integers(3, 200, length + 1)
        inputs = TENANTS[number].inputs(rng, length)
        found.append(Datum(tokens[:-1], tokens[1:], np.arange(length) > 2, **inputs))
    return found


def plain(number: int, step: int) -> list[Datum]:
    return [Datum(datum.tokens, datum.target_tokens) for datum in batch(number, step)]


def step_of(number: int, step: int, tc: TrainingClient, reference: str) -> tuple[Any, Any]:
    """Submits a gradient and its update, and waits until they are accepted."""
    tenant = TENANTS[number]
    config = tenant.config | ({"reference": reference} if tenant.compares else {})
    passed = tc.forward_backward(
        batch(number, step), tenant.loss, loss_config=config, reduction=tenant.reduction
    )
    updated = tc.optim_step()
    while updated.operation_id is None:
        assert not updated.done()
        time.sleep(0.001)
    return passed, updated


def train(runs: Mapping[int, TrainingClient], references: Sequence[str], pid: int) -> list[Any]:
    """What each run's steps gave, and at the end a forward pass; each step of all at once.

    Args:
        runs: by the tenant's number.
        pid: of the worker, which stands still until it has a step of every run.
    """
    results: dict[int, list[Any]] = {number: [] for number in runs}
    for step in range(STEPS):
        os.kill(pid, signal.SIGSTOP)
        try:
            sent = {
                number: step_of(number, step, tc, references[number]) for number, tc in runs.items()
            }
        finally:
            os.kill(pid, signal.SIGCONT)
        for number, (passed, updated) in sent.items():
            assert updated.result(120).applied
            results[number].append(passed.result(120))
    for number, tc in runs.items():
        results[number].append(tc.forward(plain(number, 0)).result(120))
    return list(results.values())


def reference_of(client: ServiceClient, number: int) -> str:
    """An artifact of a run that has moved away from the base model."""
    tc = new_run(client, number + 100)
    for step in range(3):
        tc.forward_backward(plain(number, step))
        tc.optim_step()
    return tc.save_state().artifact_id


def same(ours: Any, alone: Any) -> None:
    assert ours.metrics.keys() == alone.metrics.keys()
    for name in ours.metrics.keys() - {"compute_ms", "queue_ms", "tokens_per_second"}:
        assert ours.metrics[name] == pytest.approx(alone.metrics[name], rel=2e-3, abs=2e-5), name
    assert ours.outputs.keys() == alone.outputs.keys()
    for name, values in ours.outputs.items():
        for one, other in zip(values, alone.outputs[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(ours.logprobs, alone.logprobs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def test_each_loss_in_company_is_what_it_is_alone(
    clients: Sequence[ServiceClient], service: LocalService
):
    references = [
        reference_of(client, number) if TENANTS[number].compares else ""
        for number, client in enumerate(clients)
    ]
    (pid,) = worker_pids(service)
    alone = [
        results
        for number, client in enumerate(clients)
        for results in train({number: new_run(client, number)}, references, pid)
    ]
    for results in alone:
        assert results[0].loss != results[-2].loss
    runs = {number: new_run(client, number) for number, client in enumerate(clients)}
    together = train(runs, references, pid)
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)

    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    told = [tuple(map(int, numbers)) for numbers in PASSES.findall(service.log)]
    # The first gradient of a step may be executed before the worker has seen the others.
    assert max(largest for *_, largest in told) >= len(TENANTS) - 1
    assert sum(operations for operations, *_ in told) >= STEPS * 2 * (len(TENANTS) - 1)
