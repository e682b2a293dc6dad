"""Kills processes and disturbs streams at moments that a seed chooses, while work is in flight."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime

from fault.chaos_workload import TIMEOUT_S, Trainer
from harness.cluster import Cluster, Process
from harness.proxy import TcpProxy

_MOST_PROGRESS = 24
_OPERATION = re.compile(r"op-\w+")
_KINDS = frozenset({"kill", "cut", "delay", "drop"})
_DISTURBANCES = ("cut client", "cut worker", "drop replies to client", "drop replies to worker")


class Driver:
    """One seeded sequence of faults.

    Between two faults it lets a random number of futures resolve and then a random moment pass, so
    that faults come while work is in flight, also while what the last one broke is still away.

    Attributes:
        hits: how often each thing was hit, in which state.
        kills: SIGKILLs so far.
    """

    def __init__(
        self,
        seed: int,
        cluster: Cluster,
        trainers: Sequence[Trainer],
        client_proxies: Sequence[TcpProxy],
        worker_proxies: Sequence[TcpProxy],
        progress: threading.Condition,
    ) -> None:
        self.hits: Counter[str] = Counter()
        self.kills = 0
        self._kinds: set[str] = set()
        self._random = random.Random(seed)
        self._cluster = cluster
        self._trainers = trainers
        self._client_proxies = client_proxies
        self._worker_proxies = worker_proxies
        self._progress = progress
        self._revivals: list[threading.Thread] = []
        self._log = cluster.home / "driver.log"

    def run(self, kills: int) -> None:
        """Disturbs until so many processes were killed, and each kind of thing was done, then lets
        everything come back."""
        while self.kills < kills or self._kinds < _KINDS:
            self._let_work_pass(self._random.randrange(1, _MOST_PROGRESS))
            # When, is part of the chaos; what is hit is counted below.
            time.sleep(self._random.random() * 0.3)
            if self._random.random() < 0.55:
                self._kill(self._random.choice([self._cluster.coordinator, *self._cluster.workers]))
            else:
                self._disturb(self._random.choice(_DISTURBANCES))
        for revival in self._revivals:
            revival.join(TIMEOUT_S)
        for proxy in (*self._client_proxies, *self._worker_proxies):
            proxy.delay(0)

    def _let_work_pass(self, count: int) -> None:
        """Waits until so many more futures have resolved, and some are still open."""
        target = self._resolved() + count

        def passed() -> bool:
            return any(trainer.error for trainer in self._trainers) or (
                self._resolved() >= target and any(t.in_flight for t in self._trainers)
            )

        with self._progress:
            assert self._progress.wait_for(passed, TIMEOUT_S), f"no progress; hits: {self.hits}"
        for trainer in self._trainers:
            if trainer.error is not None:
                raise trainer.error

    def _resolved(self) -> int:
        return sum(trainer.resolved for trainer in self._trainers)

    def _kill(self, process: Process) -> None:
        if process.being_revived or not any(trainer.in_flight for trainer in self._trainers):
            return
        state = "serving" if process.ready.is_set() else "starting"
        if process in self._cluster.workers and state == "serving" and self._is_a_second_loss():
            return
        others = [
            p for p in (self._cluster.coordinator, *self._cluster.workers) if p is not process
        ]
        away = sorted(p.name for p in others if not p.ready.is_set())
        process.kill()
        self.kills += 1
        self._count(f"kill {process.name}", f"{state}; away: {' and '.join(away) or 'none'}")
        process.being_revived = True
        revival = threading.Thread(
            target=self._revive, args=(process, self._random.random() * 0.5), daemon=True
        )
        revival.start()
        self._revivals.append(revival)

    def _is_a_second_loss(self) -> bool:
        """Whether a worker was lost with an operation that is still open. Lost with another one, it
        would fail, as a poison operation does: that is a promise, too (`test_poison.py`)."""
        lost: set[str] = set()
        for line in self._cluster.coordinator.log.splitlines():
            if "was lost with" in line:
                lost.update(_OPERATION.findall(line))
        return any(lost & trainer.open_ids() for trainer in self._trainers)

    def _revive(self, process: Process, pause_s: float) -> None:
        time.sleep(pause_s)
        if process is self._cluster.coordinator:
            process.start()
        else:
            self._cluster.start_worker(process)
        process.being_revived = False

    def _disturb(self, what: str) -> None:
        towards = self._client_proxies if what.endswith("client") else self._worker_proxies
        proxy = self._random.choice(towards)
        lasting_s = self._random.random() * 0.5
        if what.startswith("drop"):
            proxy.drop_replies()
            self._later(lasting_s, proxy.cut)
        elif self._random.random() < 0.5:
            proxy.delay(self._random.random() * 0.05)
            self._later(1.0, lambda: proxy.delay(0))
            what = what.replace("cut", "delay")
        else:
            proxy.cut()
        self._count(what, f"{sum(bool(t.in_flight) for t in self._trainers)} runs in flight")

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        self._revivals.append(timer)

    def _count(self, what: str, state: str) -> None:
        self.hits[f"{what} ({state})"] += 1
        with self._log.open("a") as log:
            log.write(f"{_now()} {what} ({state})\n")
        self._kinds.add(what.split(maxsplit=1)[0])

    def report(self) -> str:
        """The histogram, most frequent first."""
        return "\n".join(f"  {count:3d} x {what}" for what, count in self.hits.most_common())


def _now() -> str:
    """As in the processes' logs."""
    return datetime.now().strftime("%F %T,%f")[:-3]
