"""Private runs of client's batches, and their ledger as it is on disk."""

from __future__ import annotations

import sqlite3
from dataclasses import fields
from typing import Any

from harness.cluster import Cluster
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient
from tensafe_server.store.charges import LedgerRow, first_break

BATCH = [Datum([1, 2, 3], [2, 3, 4]), Datum([5, 6], [6, 7])]
DP = {"dataset_id": "corpus", "noise_multiplier": 4.0}


def private_run(
    client: ServiceClient, run: dict[str, Any] | None = None, **dp: Any
) -> TrainingClient:
    return client.create_training_client({"model_ref": "m", "dp_config": DP | dp, **(run or {})})


def one_step(tc: TrainingClient, batch: list[Datum] | None = None) -> OperationFuture[Any]:
    tc.forward_backward(batch or BATCH)
    return tc.optim_step()


def ledger(cluster: Cluster, dataset: str = "corpus") -> list[LedgerRow]:
    """What is on disk, while the coordinator lives."""
    names = [field.name for field in fields(LedgerRow)]
    connection = sqlite3.connect(cluster.data / "tensafe.db")
    try:
        rows = connection.execute(
            f"SELECT {', '.join(names)} FROM dp_ledger WHERE dataset_id = ? ORDER BY position",
            (dataset,),
        ).fetchall()
    finally:
        connection.close()
    return [LedgerRow(*row) for row in rows]


def events(cluster: Cluster, dataset: str = "corpus") -> list[str]:
    """What happened to charges, in order; the chain is whole."""
    rows = ledger(cluster, dataset)
    assert first_break(rows) is None
    return [row.event for row in rows]
