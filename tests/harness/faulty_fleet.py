"""Clusters whose workers wait, hang or crash where a test wants it."""

from __future__ import annotations

import os
import select
import sys
import threading
from pathlib import Path
from typing import Any

from harness.cluster import Cluster, Process
from tensafe_client import Datum, OperationFuture, ServiceClient, TrainingClient

TIMEOUT_S = 60.0
_LAST_BREATH_S = 0.5
PROGRAM = Path(__file__).with_name("faulty_worker.py")


def batch(first: int = 5) -> list[Datum]:
    """One row; `first` may be a mark of `faulty_worker`."""
    return [Datum(tokens=[first, 6, 7], target_tokens=[6, 7, 8], weights=[1.0] * 3)]


def train(tc: TrainingClient, steps: int) -> list[tuple[int, float]]:
    """Pipelines so many steps; returns (step, loss) of each."""
    pairs = [(tc.forward_backward(batch()), tc.optim_step()) for _ in range(steps)]
    return [
        (updated.result(TIMEOUT_S).step, passed.result(TIMEOUT_S).loss) for passed, updated in pairs
    ]


def wait_running(client: ServiceClient, future: OperationFuture[Any]) -> None:
    """Returns when the operation runs; the log of states has no event for that to wait on."""
    while True:
        operation_id = future.operation_id
        if operation_id and client.operation(operation_id).state == "running":
            return
        assert not future.done()


class FaultyCluster(Cluster):
    """A cluster of faulty workers, see `faulty_worker`.

    Attributes:
        deadly: while this file is there, CRASH_LATER crashes.
    """

    def __init__(self, home: Path, *options: str) -> None:
        super().__init__(home, *options)
        self.deadly = home / "deadly"
        self._tenant_key = ""
        self._environments: dict[str, dict[str, str]] = {}

    def add_faulty_worker(
        self,
        *options: str,
        port: int | None = None,
        gated_save: bool = False,
        watchdog: bool = True,
        text: str = "",
    ) -> Process:
        """Starts one more worker; each has gates of its own. `text`: how its completions end."""
        name = f"worker-{len(self.workers)}"
        gate = self.home / f"{name}.gate"
        os.mkfifo(gate)
        command = [sys.executable, str(PROGRAM), "--backend", "mock", "--name", name]
        command += ["--connect", f"127.0.0.1:{port or self.port}", *options]
        worker = Process(name, self.home, command, "connected to ")
        self.workers.append(worker)
        environment = {
            "FAULTY_GATE": str(gate),
            "FAULTY_NAME": name,
            "FAULTY_DEADLY": str(self.deadly),
            "FAULTY_SAMPLE_GATE": str(self._sample_gate(name)),
            "FAULTY_TEXT": text,
        }
        if gated_save:
            environment["FAULTY_GATED_SAVE"] = "1"
        if not watchdog:
            environment["FAULTY_WATCHDOG"] = "off"
        self._environments[name] = environment
        self.start_worker(worker, environment)
        worker.wait_ready()
        return worker

    def client(self) -> ServiceClient:
        """A client of the only tenant."""
        self._tenant_key = self._tenant_key or self.new_tenant("tenant")
        return ServiceClient(self.target, api_key=self._tenant_key)

    def revive(self, worker: Process) -> None:
        """Starts a worker that has ended, and waits until it is connected."""
        self.start_worker(worker, self._environments[worker.name])
        worker.wait_ready()

    def next_death(self, unless: OperationFuture[Any] | None = None) -> tuple[Process, int] | None:
        """Waits until a worker ends, and returns it with its exit status; None if an operation
        ends before."""
        ended, tell = os.pipe()
        if unless is not None:
            unless.add_done_callback(lambda _: os.write(tell, b"!"))
        poller = select.poll()
        handles = {os.pidfd_open(worker.pid): worker for worker in self.workers}
        for handle in (*handles, ended):
            poller.register(handle, select.POLLIN)
        ready = [handle for handle, _ in poller.poll(TIMEOUT_S * 1e3)]
        assert ready, "no worker has ended, and the operation neither"
        if ready == [ended]:
            # A dying process closes its streams first, of which others may hear before us.
            poller.unregister(ended)
            ready = [handle for handle, _ in poller.poll(_LAST_BREATH_S * 1e3)]
        for handle in handles:
            os.close(handle)
        for handle in ready:
            if handle in handles:
                return handles[handle], handles[handle].wait_ended()
        return None

    def let_samples_go(self, worker: Process) -> None:
        """Opens the gate of a worker's samples, from now on."""
        self._sample_gate(worker.name).touch()

    def _sample_gate(self, name: str) -> Path:
        return self.home / f"{name}.samples"

    def open_gate(self, worker: Process) -> None:
        """Lets the operation pass that waits there, now or when it comes."""
        gate = self.home / f"{worker.name}.gate"

        def write() -> None:
            with gate.open("wb") as file:  # blocks until somebody reads
                file.write(b"go")

        threading.Thread(target=write, daemon=True).start()
