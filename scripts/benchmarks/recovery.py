"""What recovery costs: in steady state, after a worker's death, and after a coordinator's.

Everything is measured on real processes. The steady state compares two services that take turns,
one as it is by default on a disk, one with its data in memory (a tmpfs) and without snapshots.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from local_cluster import Cluster

from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient

MODEL = "smollm2-135m"
ROWS, LENGTH = 4, 128
_MEMORY = Path("/dev/shm")
_NO_SNAPSHOTS = ("--snapshot-steps", "0", "--snapshot-mib", "0", "--snapshot-replay-s", "0")
_WORKER = ("--backend", "torch", "--model", MODEL)
_TINY = [Datum(range(1, 65), range(2, 66), weights=[1.0] * 64)]


@contextmanager
def _service(
    data_in: Path | None, workers: int, *options: str
) -> Iterator[tuple[Cluster, ServiceClient]]:
    with (
        tempfile.TemporaryDirectory(prefix="tensafe-bench-") as home,
        tempfile.TemporaryDirectory(prefix="tensafe-bench-", dir=data_in) as data,
        Cluster(Path(home), *options, data=Path(data) / "d") as cluster,
    ):
        cluster.start()
        for _ in range(workers):
            cluster.add_worker(*_WORKER)
        for worker in cluster.workers:
            worker.wait_ready(300)
        with ServiceClient(cluster.target, api_key=cluster.new_tenant("bench")) as client:
            yield cluster, client


def _batch(seed: int) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(0, 49_000, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids}


def _train(tc: TrainingClient, steps: int) -> list[OperationFuture[Any]]:
    return [
        f for step in range(steps) for f in (tc.forward_backward(_batch(step)), tc.optim_step())
    ]


def steady_state(rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second, and processor seconds of the service, of each round: `default`,
    `snapshot_each_round` and `both_off`, in another order each time.

    `snapshot_each_round` makes a snapshot every `steps` steps, so that each round has one.
    """
    cells: dict[str, list[float]] = {}
    with (
        _service(None, 1) as default,
        _service(None, 1, "--snapshot-steps", str(steps)) as often,
        _service(_MEMORY, 1, *_NO_SNAPSHOTS) as off,
    ):
        services = {"both_off": off, "default": default, "snapshot_each_round": often}
        runs = {
            name: client.create_training_client({"model_ref": MODEL, "seed": 0})
            for name, (_, client) in services.items()
        }
        turns = list(services)
        for number in range(rounds + 1):
            for name in turns:
                cluster, _ = services[name]
                begin, cpu_begin = time.perf_counter(), _cpu_s(cluster)
                for future in _train(runs[name], steps):
                    future.result()
                rate = ROWS * LENGTH * steps / (time.perf_counter() - begin)
                if number:  # the first round warms everything up
                    cells.setdefault(f"steady/{name}_tokens_per_s", []).append(rate)
                    cpu_s = _cpu_s(cluster) - cpu_begin
                    cells.setdefault(f"steady/{name}_cpu_s", []).append(cpu_s)
            turns.append(turns.pop(0))
        snapshots = runs["snapshot_each_round"].refresh().snapshot_seq
        cells["steady/newest_snapshot_seq"] = [float(snapshots)]
    return cells


def _cpu_s(cluster: Cluster) -> float:
    """Processor seconds that the coordinator and the workers have used."""
    processes = [cluster.coordinator, *cluster.workers]
    return sum(_ticks(process.pid) for process in processes) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def worker_death(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds from the SIGKILL of a run's worker to its next resolved future, with a second worker
    standing by, and what bounds it: loading the state, and computing the replayed operations and
    the one that resolves."""
    cells: dict[str, list[float]] = {}
    with _service(None, 2, "--snapshot-steps", str(steps)) as (cluster, client):
        for _ in range(rounds):
            tc = client.create_training_client({"model_ref": MODEL, "seed": 0})
            for future in _train(tc, steps):
                future.result()
            artifact = tc.save_state(include_optimizer=True)
            waiting = _train(tc, steps)
            waiting[2].result()
            holder = _holder(cluster, tc.run_id)
            done = [future for future in waiting if future.done()]
            holder.kill()
            begin = time.perf_counter()
            after = waiting[len(done)]
            after.result()
            seconds = time.perf_counter() - begin
            replayed = [f for f in done if f.seq > tc.refresh().snapshot_seq]
            load_s = _load_seconds(client, artifact.artifact_id)
            computed_s = sum(_compute_s(client, future) for future in [*replayed, after])
            cells.setdefault("worker/kill_to_next_future_s", []).append(seconds)
            cells.setdefault("worker/load_s", []).append(load_s)
            cells.setdefault("worker/replay_and_next_s", []).append(computed_s)
            cells.setdefault("worker/replayed_operations", []).append(float(len(replayed)))
            cluster.start_worker(holder)
            for future in waiting:
                future.result()
            holder.wait_ready(300)
            tc.delete()
    return cells


def _holder(cluster: Cluster, run_id: str) -> Any:
    """The worker that holds the only active run: the one that uses the processor."""
    used = {worker: _ticks(worker.pid) for worker in cluster.workers}
    time.sleep(0.2)
    return max(cluster.workers, key=lambda worker: _ticks(worker.pid) - used[worker])


def _load_seconds(client: ServiceClient, artifact_id: str) -> float:
    """What fetching and loading a whole state takes, by the run that begins with it."""
    tc = client.create_training_client(from_artifact=artifact_id)
    [operation] = client.operations(tc.run_id)
    tc.delete()
    return operation.compute_ms / 1e3


def _compute_s(client: ServiceClient, future: OperationFuture[Any]) -> float:
    return client.operation(future.operation_id or "").compute_ms / 1e3


def coordinator_restart(rounds: int, runs: int, operations: int) -> dict[str, list[float]]:
    """Seconds from starting a killed coordinator to its first answer: with an empty store, with so
    many runs and finished operations, and with as many unfinished ones on top."""
    cells: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="tensafe-bench-") as home:
        cluster = Cluster(Path(home))
        with cluster:
            cluster.start()
            key = cluster.new_tenant("bench")
            _restarts(cluster, key, rounds, "empty", cells)
            worker = cluster.add_worker("--backend", "mock")
            worker.wait_ready()
            with ServiceClient(cluster.target, api_key=key) as client:
                clients = [client.create_training_client({"model_ref": "m"}) for _ in range(runs)]
                futures = _fill(clients, operations)
                for future in futures:
                    future.result()
                worker.stop()
                cluster.workers.clear()
                _restarts(cluster, key, rounds, "finished", cells)
                for future in _fill(clients, operations):
                    future.add_done_callback(lambda _: None)
                client._session.io.run(client._session._submitter.flush())
                _restarts(cluster, key, rounds, "finished_and_unfinished", cells)
    return cells


def _fill(clients: list[TrainingClient], operations: int) -> list[OperationFuture[Any]]:
    each = operations // len(clients) // 2
    return [
        future
        for _ in range(each)
        for tc in clients
        for future in (tc.forward_backward(_TINY), tc.optim_step())
    ]


def _restarts(
    cluster: Cluster, key: str, rounds: int, name: str, cells: dict[str, list[float]]
) -> None:
    for _ in range(rounds):
        cluster.coordinator.kill()
        begin = time.perf_counter()
        cluster.coordinator.start()
        cluster.coordinator.wait_ready()
        ready_s = time.perf_counter() - begin
        with ServiceClient(cluster.target, api_key=key) as client:
            client.runs(limit=1)
            client.operations(limit=1)
        cells.setdefault(f"coordinator/{name}_ready_s", []).append(ready_s)
        answered_s = time.perf_counter() - begin
        cells.setdefault(f"coordinator/{name}_first_answer_s", []).append(answered_s)


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """What the goals are about; of the best rounds, on a machine that others use too."""
    found = {}
    if "steady/both_off_tokens_per_s" in cells:
        off = cells["steady/both_off_tokens_per_s"]
        for name in ("default", "snapshot_each_round"):
            on = cells[f"steady/{name}_tokens_per_s"]
            found[f"steady {name}/both_off, best"] = max(on) / max(off)
            found |= _summary(f"steady {name}/both_off", _quotients(on, off))
            cpu_on, cpu_off = cells[f"steady/{name}_cpu_s"], cells["steady/both_off_cpu_s"]
            found |= _summary(f"steady {name}/both_off, by CPU time", _quotients(cpu_off, cpu_on))
    if "worker/load_s" in cells:
        over = [
            seconds - load - compute
            for seconds, load, compute in zip(
                cells["worker/kill_to_next_future_s"],
                cells["worker/load_s"],
                cells["worker/replay_and_next_s"],
                strict=True,
            )
        ]
        found["worker kill to next future beyond load and replay, s, best"] = min(over)
        found["worker kill to next future beyond load and replay, s, median"] = median(over)
    for name in ("empty", "finished", "finished_and_unfinished"):
        if f"coordinator/{name}_ready_s" in cells:
            found[f"coordinator {name}: start to first answer, s, best"] = min(
                cells[f"coordinator/{name}_first_answer_s"]
            )
    return found


def _quotients(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _summary(name: str, pairs: list[float]) -> dict[str, float]:
    """The median of a round's quotients, and the lower end of its 95% interval by bootstrap."""
    draws = np.random.default_rng(0).choice(pairs, (10_000, len(pairs)))
    lower = float(np.quantile(np.median(draws, axis=1), 0.025))
    return {f"{name}, median of pairs": median(pairs), f"{name}, its lower end": lower}
