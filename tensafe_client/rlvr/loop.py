"""The loop of an RLVR training: sample, score, learn, save."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tensafe_client.errors import TenSafeError
from tensafe_client.rlvr import report as reports
from tensafe_client.rlvr.collecting import CollectedBatch, Collector, PendingBatch, derived
from tensafe_client.rlvr.config import RLVRConfig
from tensafe_client.rlvr.learning import Judged, Updates, grouped, judge, submit
from tensafe_client.rlvr.report import Evaluation, IterationReport
from tensafe_client.rlvr.rollouts import Rollout
from tensafe_client.rlvr.state import TrainerState
from tensafe_client.training import TrainingClient


class RewardsFailedError(TenSafeError):
    """More rewards of a batch failed than `max_failed_rewards` allows; the run is as before it."""

    remedy = "mend the reward, give it more time (reward_timeout_s), or allow more failures"


@dataclass(frozen=True)
class RLVRResult:
    """What a training has done.

    Attributes:
        artifact_id: the last checkpoint.
        reports: of each iteration, in order.
        first_evaluation: held-out problems before the first iteration, if they were asked for.
        stopped: whether it ended before its last iteration, because it was asked to.
    """

    artifact_id: str
    reports: list[IterationReport]
    first_evaluation: Evaluation | None
    stopped: bool


@dataclass(frozen=True)
class _Submitted:
    """An iteration whose updates are on their way."""

    iteration: int
    batches: list[CollectedBatch]
    rollouts: list[Rollout]
    updates: Updates
    judged: Judged
    stale: int


class TrainingLoop:
    """Pipelined iterations, from a state to the last one. A checkpoint has nothing sent ahead."""

    def __init__(
        self,
        run: TrainingClient,
        config: RLVRConfig,
        state: TrainerState,
        stop: threading.Event,
        collector: Collector,
        evaluator: Collector | None,
        on_report: Callable[[IterationReport], None],
        on_evaluation: Callable[[int, Evaluation], None],
    ) -> None:
        self._run, self._config, self._state, self._stop = run, config, state, stop
        self._collector, self._evaluator = collector, evaluator
        self._on_report, self._on_evaluation = on_report, on_evaluation
        self._ahead: deque[PendingBatch] = deque()
        self._submitted: deque[_Submitted] = deque()
        self._reports: list[IterationReport] = []
        self._since = time.perf_counter()
        self._artifact_id = ""
        self._saved_at = -1

    def run(self) -> RLVRResult:
        """Trains until the last iteration, or until it is to stop, and saves."""
        state, config = self._state, self._config
        first = self._evaluate() if self._evaluator is not None else None
        while state.iteration < config.iterations and not self._stop.is_set():
            try:
                self._submitted.append(self._iterate())
            except RewardsFailedError:
                self._drop_what_was_sent_ahead()
                self._settle(0)  # what was learned before it is told
                raise
            evaluates, saves = (
                self._is_due(config.eval_every),
                self._is_due(config.checkpoint_every),
            )
            # One iteration's updates are on their way while the next one's rewards are computed.
            self._settle(0 if evaluates or saves else 1, evaluates=evaluates)
            if saves:
                self._save()
        self._settle(0)
        if self._saved_at != state.iteration:
            self._drop_what_was_sent_ahead()
            self._save()
        stopped = state.iteration < config.iterations
        return RLVRResult(self._artifact_id, self._reports, first, stopped)

    def _is_due(self, every: int) -> bool:
        iteration = self._state.iteration
        return every > 0 and (iteration % every == 0 or iteration == self._config.iterations)

    def _iterate(self) -> _Submitted:
        """Collects rollouts and submits what is learned from them."""
        state, config = self._state, self._config
        batches: list[CollectedBatch] = []
        groups: list[list[Rollout]] = []
        judged, average = Judged([], 0, 0), state.average
        stale = 0
        while not batches or (
            judged.problems < config.prompts and len(batches) < config.max_batches
        ):
            batch = self._collect()
            batches.append(batch)
            if state.iteration - batch.sampled_at > config.max_staleness:
                stale += len(batch.rollouts)
                continue
            # A batch's mean changes with each that joins it: all are judged again.
            groups += grouped(batch.rollouts)
            average = dataclasses.replace(state.average)
            judged = judge(groups, config, average)
        rollouts = [rollout for batch in batches for rollout in batch.rollouts]
        self._check_rewards(rollouts)
        state.average = average
        # What is sampled ahead comes before the updates in the run's order.
        self._send_ahead(config.iterations - state.iteration - 1)
        updates = submit(self._run, judged.items, config, derived(config.seed, state.iteration))
        state.iteration += 1
        return _Submitted(state.iteration, batches, rollouts, updates, judged, stale)

    def _collect(self) -> CollectedBatch:
        if not self._ahead:
            self._begin()
        return self._collector.finish(self._ahead.popleft())

    def _send_ahead(self, iterations_left: int) -> None:
        """Samples for the next iterations, but not across a checkpoint or a stop."""
        state, config = self._state, self._config
        wanted = min(config.max_staleness, iterations_left)
        for every in (config.checkpoint_every, config.eval_every):
            if every:
                wanted = min(wanted, every - 1 - state.iteration % every)
        if self._stop.is_set():
            wanted = 0
        while len(self._ahead) < wanted:
            self._begin()

    def _begin(self) -> None:
        state, config = self._state, self._config
        first = state.next_batch * config.prompts
        self._ahead.append(
            self._collector.begin(
                range(first, first + config.prompts),
                config.group_size,
                sampled_at=state.iteration,
                seed=derived(config.seed, state.next_batch),
            )
        )
        state.next_batch += 1

    def _drop_what_was_sent_ahead(self) -> None:
        """After a stop: those problems come first when the training goes on, sampled anew."""
        self._state.next_batch -= len(self._ahead)
        while self._ahead:
            self._ahead.pop().first_turn.cancel()

    def _check_rewards(self, rollouts: list[Rollout]) -> None:
        failed = [one.failure for one in rollouts if one.failure is not None]
        if len(failed) > self._config.max_failed_rewards * len(rollouts):
            raise RewardsFailedError(
                f"{len(failed)} of {len(rollouts)} rewards failed; the first: {failed[0].kind}: "
                f"{failed[0].message}",
                metadata={"run_id": self._run.run_id},
            )

    def _settle(self, most: int, *, evaluates: bool = False) -> None:
        """Waits until at most so many iterations are on their way, and reports the others."""
        while len(self._submitted) > most:
            report = self._report(self._submitted.popleft())
            if evaluates and not self._submitted:
                report = dataclasses.replace(report, held_out=self._evaluate())
            self._reports.append(report)
            self._on_report(report)

    def _report(self, submitted: _Submitted) -> IterationReport:
        begin = time.perf_counter()
        updates = [[call.result() for call in calls] for calls in submitted.updates.passes]
        passes = [result for results in updates for result in results]
        steps = [future.result() for future in submitted.updates.steps]
        now = time.perf_counter()
        since, self._since = self._since, now
        rollouts = submitted.rollouts
        found = reports.rewarded(rollouts, self._config.pass_reward)
        lengths = [rollout.length for rollout in rollouts]
        grad_norm, learning_rate = reports.last_update(steps)
        return IterationReport(
            iteration=submitted.iteration,
            step=steps[-1].step if steps else self._run.step,
            updates=len(steps),
            reward_mean=found.mean,
            reward_std=found.std,
            reward_min=found.least,
            reward_max=found.most,
            pass_rate=found.pass_rate,
            parts=found.parts,
            problems=submitted.judged.problems,
            equal_problems=submitted.judged.equal,
            stale_rollouts=submitted.stale,
            failed_rewards=reports.failures(rollouts),
            response_tokens=sum(lengths) / max(1, len(lengths)),
            truncated=sum(one.truncated for one in rollouts) / max(1, len(rollouts)),
            entropy=reports.entropy(rollouts),
            metrics=reports.loss_metrics(passes),
            loss=reports.last_loss(updates),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            sampled_tokens=sum(lengths),
            learned_tokens=sum(one.tokens_processed for one in passes),
            seconds=now - since,
            sampling_wait_s=sum(batch.sampling_s for batch in submitted.batches),
            scoring_s=sum(batch.scoring_s for batch in submitted.batches),
            learning_wait_s=now - begin,
        )

    def _evaluate(self) -> Evaluation:
        assert self._evaluator is not None
        config = self._config
        count = config.eval_problems
        begun = self._evaluator.begin(
            range(count), 1, sampled_at=self._state.iteration, seed=derived(config.seed, -1)
        )
        rollouts = self._evaluator.finish(begun).rollouts
        found = reports.rewarded(rollouts, config.pass_reward)
        failed = sum(reports.failures(rollouts).values())
        evaluation = Evaluation(found.pass_rate, found.mean, count, failed)
        self._on_evaluation(self._state.iteration, evaluation)
        return evaluation

    def _save(self) -> None:
        saved = self._run.save_state(
            metadata=self._state.metadata(self._config), include_optimizer=True
        )
        self._artifact_id, self._saved_at = saved.artifact_id, self._state.iteration
