"""Private runs on tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness.cluster import Cluster
from harness.private_worker import PrivateWorker

from tensafe_client import ServiceClient


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Neighbouring test processes must not fight for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[PrivateWorker]:
    """Of the module's cluster."""
    worker = PrivateWorker(cluster.target, cluster.worker_key)
    yield worker
    worker.close()


@pytest.fixture
def client(
    cluster: Cluster, worker: PrivateWorker, request: pytest.FixtureRequest
) -> Iterator[ServiceClient]:
    """Of a tenant that no other test has; the worker is there."""
    name = request.node.name.translate(str.maketrans("[]", ".."))[:60]
    with ServiceClient(cluster.target, api_key=cluster.new_tenant(name)) as client:
        yield client
