"""Several clients that train at once, each a run of its own, against one client by itself.

What the service makes of it: whether the planner brings small operations together in one pass. The
engine's own gain without a service is `bench_engine.py --part many`.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
from local_service import local_service

from benchmarks.training import MODEL
from tensafe_client import OperationFuture, ServiceClient, TrainingClient

CLIENTS = 8
LENGTHS = (16, 64)
AHEAD = {"each step awaited": 1, "a step ahead": 2}
"""Steps that a client has in flight."""


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step, by `CLIENTSxTOKENS, HOW/WHO`: of one client, and of all eight."""
    cells: dict[str, list[float]] = {}
    with (
        local_service(backend="torch", models=[MODEL]) as service,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        clients = [ServiceClient(service.target, api_key=service.api_key) for _ in range(CLIENTS)]
        runs = [
            client.create_training_client({"model_ref": MODEL, "seed": seed})
            for seed, client in enumerate(clients)
        ]

        def seconds(members: list[TrainingClient], length: int, ahead: int) -> float:
            begin = time.perf_counter()
            list(pool.map(lambda run: _train(run, length, steps, ahead), members))
            return (time.perf_counter() - begin) / steps

        for length in LENGTHS:
            for how, ahead in AHEAD.items():
                seconds(runs, length, ahead)
                for turn in range(rounds):
                    sides = {"one": runs[:1], "all": runs}
                    for who, members in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
                        cell = f"{CLIENTS}x{length}, {how}/{who}"
                        cells.setdefault(cell, []).append(seconds(members, length, ahead))
        for client in clients:
            client.close()
    return cells


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """Tokens per second of all clients over those of one: medians of the rounds' quotients."""
    found = {}
    for name, alone in cells.items():
        cell, _, who = name.rpartition("/")
        if who == "one":
            pairs = zip(alone, cells[f"{cell}/all"], strict=True)
            found[f"{cell}: all/one"] = median(CLIENTS * one / every for one, every in pairs)
    return found


def _train(run: TrainingClient, length: int, steps: int, ahead: int) -> None:
    ids = np.random.default_rng(length).integers(0, 49_000, (1, length))
    batch = {"input_ids": ids, "labels": ids}
    pending: deque[OperationFuture[Any]] = deque()
    for _ in range(steps):
        pending += (run.forward_backward(batch), run.optim_step())
        while len(pending) >= 2 * ahead:
            pending.popleft().result()
    for future in pending:
        future.result()
