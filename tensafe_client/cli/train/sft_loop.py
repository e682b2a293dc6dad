"""The loop behind `tensafe train sft`: pipelined, interruptible, resumable."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tensafe_client.cli.train.progress import Progress, Step
from tensafe_client.data import Datum
from tensafe_client.futures import OperationFuture
from tensafe_client.results import ForwardBackwardResult, ForwardResult, OptimStepResult
from tensafe_client.training import TrainingClient

_STEPS_AHEAD = 3
"""Steps in flight: enough that the worker never waits for us, few enough to stop soon."""


@dataclass(frozen=True)
class _Sent:
    passes: list[OperationFuture[ForwardBackwardResult]]
    update: OperationFuture[OptimStepResult]


@dataclass(frozen=True)
class SftLoop:
    """Trains until `total_steps` applied updates, or until `stop` is set.

    Attributes:
        run: the run; its own step is where the loop begins.
        batches: batches to learn, from the run's position on.
        learning_rate: learning rate of each update, counted from 1.
        total_steps: applied updates of the run at the end.
        stop: when set, nothing more is sent; what was sent is waited for.
        progress: told of everything.
        held_out: batches to evaluate on.
        eval_every: evaluate after every so many updates, before the first and after the last;
            0 for never.
        save_every: save after every so many updates; 0 for at the end only.
    """

    run: TrainingClient
    batches: Iterator[Sequence[Datum]]
    learning_rate: Callable[[int], float]
    total_steps: int
    stop: threading.Event
    progress: Progress
    held_out: Sequence[Sequence[Datum]] = ()
    eval_every: int = 0
    save_every: int = 0

    def __call__(self) -> str:
        """Trains and saves.

        Returns:
            Id of the last artifact.

        Raises:
            TenSafeError: if an operation fails.
        """
        first = self.run.step
        self.progress.on_start(self.run.run_id, first, self.total_steps)
        if self.eval_every:
            self._evaluate(first)
        sent: deque[_Sent] = deque()
        done = first
        artifact_id, saved_step = "", -1
        for step in range(first + 1, self.total_steps + 1):
            if self.stop.is_set():
                break
            sent.append(self._send(step))
            pause = self._is_due(step, self.save_every) or self._is_due(step, self.eval_every)
            while len(sent) > (0 if pause else _STEPS_AHEAD):
                done = self._receive(sent.popleft())
            if pause and self._is_due(step, self.eval_every):
                self._evaluate(step)
            if pause and self._is_due(step, self.save_every):
                artifact_id, saved_step = self._save(step), step
        while sent:
            done = self._receive(sent.popleft())
        if saved_step != done:
            artifact_id = self._save(done)
        return artifact_id

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _send(self, step: int) -> _Sent:
        rate = self.learning_rate(step)
        passes = []
        for _ in range(self.run.config.gradient_accumulation_steps):
            passes.append(self.run.forward_backward(next(self.batches)))
            update = self.run.optim_step(learning_rate=rate)
        return _Sent(passes, update)

    def _receive(self, sent: _Sent) -> int:
        results = [future.result() for future in sent.passes]
        update = sent.update.result()
        scored = [result.metrics["scored_tokens"] for result in results]
        weighted = sum(result.loss * n for result, n in zip(results, scored, strict=True))
        self.progress.on_step(
            Step(
                step=update.step,
                total_steps=self.total_steps,
                loss=weighted / sum(scored),
                grad_norm=update.grad_norm,
                learning_rate=update.learning_rate,
                tokens=sum(result.tokens_processed for result in results),
            )
        )
        return update.step

    def _evaluate(self, step: int) -> None:
        futures = [self.run.forward(batch) for batch in self.held_out]
        loss, scored = mean_loss([future.result() for future in futures])
        self.progress.on_eval(step, loss, scored)

    def _save(self, step: int) -> str:
        artifact_id = self.run.save_state(metadata={"step": step}).artifact_id
        self.progress.on_saved(step, artifact_id)
        return artifact_id


def mean_loss(results: Sequence[ForwardResult]) -> tuple[float, int]:
    """Mean loss of the scored tokens of several forward calls, and how many those are."""
    scored = [round(result.metrics["scored_tokens"]) for result in results]
    total = sum(result.loss * n for result, n in zip(results, scored, strict=True))
    return total / sum(scored), sum(scored)
