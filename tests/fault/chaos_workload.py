"""What the tenants of the chaos run do: SFT by pipelined operations, the same whenever repeated."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe_client import Datum, OperationFuture, ServiceClient, TenSafeError

log = logging.getLogger(__name__)

TIMEOUT_S = 300.0
_IN_FLIGHT_STEPS = 6


@dataclass(frozen=True)
class Tenant:
    """One tenant's training: its configuration, and what it does between steps.

    Attributes:
        large_every: one step in so many takes one more batch, which the server keeps in a file, as
            its result; 0: none does.
    """

    name: str
    config: dict[str, Any]
    backwards_per_step: int
    save_every: int
    large_every: int = 0


TENANTS = [
    Tenant(
        "plain",
        {"seed": 1, "lora_config": {"rank": 4, "dropout": 0.0}, "optimizer": {"name": "sgd"}},
        backwards_per_step=1,
        save_every=17,
        large_every=7,
    ),
    Tenant(
        "dropout",
        {"seed": 2, "lora_config": {"rank": 8, "dropout": 0.1}},
        backwards_per_step=2,
        save_every=23,
    ),
    Tenant(
        "accumulating",
        {"seed": 3, "gradient_accumulation_steps": 3, "lora_config": {"dropout": 0.05}},
        backwards_per_step=1,
        save_every=29,
    ),
]


@dataclass
class Story:
    """What one run was asked, and what came of it.

    Attributes:
        kinds: of each operation sent, in order.
        results: of each future that ended, in order: the loss and the sum of the log-probabilities'
            bytes, the step, or the artifact's sums.
        resolutions: how often each future resolved, by seq.
        steps: how many optim_steps it takes.
        large: how many of its batches were large.
        told: cursor and step of each update that one stream of metrics, begun before the first,
            has told of.
    """

    run_id: str = ""
    kinds: list[str] = field(default_factory=list)
    results: list[tuple[Any, ...]] = field(default_factory=list)
    resolutions: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    large: int = 0
    told: list[tuple[int, int]] = field(default_factory=list)

    @property
    def applied(self) -> list[int]:
        """The steps of its applied updates."""
        return [result[1] for result in self.results if result[0] == "optim_step" and result[2]]


class Trainer:
    """Trains one tenant's run in a thread until it is told how far to go.

    Attributes:
        story: what happened so far.
        error: what ended it early; None if nothing did.
    """

    def __init__(self, tenant: Tenant, client: ServiceClient, progress: threading.Condition):
        self.story = Story()
        self.error: BaseException | None = None
        self._tenant = tenant
        self._client = client
        self._progress = progress
        self._resolved = 0
        self._finish = threading.Event()
        self._run = client.create_training_client(
            {"model_ref": "tiny", "deterministic": True, **tenant.config}
        )
        self.story.run_id = self._run.run_id
        self._open: deque[OperationFuture[Any]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def in_flight(self) -> int:
        """Operations that were sent and have not resolved."""
        return len(self.story.kinds) - self._resolved

    @property
    def resolved(self) -> int:
        return self._resolved

    def open_ids(self) -> set[str | None]:
        """Of the operations that have not resolved."""
        return {future.operation_id for future in list(self._open) if not future.done()}

    def start(self, steps: int | None = None) -> None:
        """Trains so many steps; None: until `finish`."""
        self._thread = threading.Thread(target=self._work, args=(steps,), daemon=True)
        threading.Thread(target=self._watch, daemon=True).start()
        self._thread.start()

    def finish(self) -> None:
        """Ends after the step at hand, with a save."""
        self._finish.set()

    def join(self) -> Story:
        assert self._thread is not None
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), f"{self._tenant.name} hangs: {self._open[0]!r}"
        if self.error is not None:
            raise self.error
        with self._progress:
            everything = self._progress.wait_for(
                lambda: len(self.story.told) >= len(self.story.applied), TIMEOUT_S
            )
        assert everything, f"the metrics end with {self.story.told[-3:]}"
        return self.story

    def _watch(self) -> None:
        """Follows the run's metrics until the client is closed."""
        try:
            for item in self._run.metrics(follow=True):
                with self._progress:
                    self.story.told.append((item.cursor, item.step))
                    self._progress.notify_all()
        except TenSafeError as error:
            log.info("the metrics of %s end: %s", self._run.run_id, error)

    def _work(self, steps: int | None) -> None:
        try:
            while not self._finish.is_set() and (steps is None or self.story.steps < steps):
                self._step(self.story.steps)
                self.story.steps += 1
                while len(self._open) > _IN_FLIGHT_STEPS * 2:
                    self._take()
            self._send(self._run.save_state_async())
            while self._open:
                self._take()
        except BaseException as error:
            self.error = error
            with self._progress:
                self._progress.notify_all()

    def _step(self, step: int) -> None:
        for part in range(self._tenant.backwards_per_step):
            self._send(self._run.forward_backward(_batch(self._tenant.config["seed"], step, part)))
        if self._tenant.large_every and step % self._tenant.large_every == 3:
            self._send(self._run.forward_backward(_large_batch(step)))
            self.story.large += 1
        self._send(self._run.optim_step(learning_rate=5e-3))
        if step % self._tenant.save_every == self._tenant.save_every - 1:
            self._send(self._run.save_state_async({"step": step}))
        if step % 11 == 5:
            self._send(self._run.forward(_batch(99, 0, 0)))

    def _send(self, future: OperationFuture[Any]) -> None:
        self.story.kinds.append(future.kind)
        self._open.append(future)
        future.add_done_callback(self._on_done)

    def _on_done(self, future: Any) -> None:
        with self._progress:
            self.story.resolutions[future.seq] = self.story.resolutions.get(future.seq, 0) + 1
            self._resolved += 1
            self._progress.notify_all()

    def _take(self) -> None:
        future = self._open[0]
        result = future.result(TIMEOUT_S)
        self._open.popleft()
        if future.kind in ("forward", "forward_backward"):
            told = np.concatenate(result.logprobs).tobytes()
            outcome: tuple[Any, ...] = (result.loss, hashlib.sha256(told).hexdigest())
        elif future.kind == "optim_step":
            outcome = (result.step, result.applied, result.grad_norm)
        else:
            files = self._client.artifact(result.artifact_id).files
            outcome = tuple((f.name, f.sha256) for f in files if f.name.endswith(".safetensors"))
        self.story.results.append((future.kind, *outcome))


def _batch(seed: int, step: int, part: int) -> list[Datum]:
    draw = np.random.default_rng((seed, step, part))
    return _datums(draw.integers(3, 200, (2, int(draw.integers(12, 40)))))


def _large_batch(step: int) -> list[Datum]:
    """16,800 tokens, of which the log-probabilities alone take more than 64 KiB."""
    return _datums(np.random.default_rng((98, step)).integers(3, 200, (150, 113)))


def _datums(tokens: NDArray[np.int64]) -> list[Datum]:
    return [Datum(row[:-1], row[1:], weights=[1.0] * (len(row) - 1)) for row in tokens]
