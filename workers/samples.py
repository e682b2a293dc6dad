"""SAMPLE operations that run: begun in their turn, then carried on step by step beside training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensafe.v1 import training_pb2, worker_pb2
from workers import wire
from workers.execution import Execution
from workers.failures import fail
from workers.operations import SampleChunk, SampleOutcome
from workers.outcome_size import check_size
from workers.progress import Progress, cancelled
from workers.sampler import Sampler
from workers.watchdog import Activity, OperationLimits


@dataclass(frozen=True, slots=True)
class _Running:
    planned: worker_pb2.PlannedOperation
    run_id: str
    limit_s: float


class Samples:
    """What the sampler is at, on the executor's thread."""

    def __init__(
        self,
        sampler: Sampler,
        execution: Execution,
        progress: Progress,
        activity: Activity,
        limits: OperationLimits,
    ) -> None:
        self._sampler = sampler
        self._execution = execution
        self._progress = progress
        self._activity = activity
        self._limits = limits
        self._running: dict[str, _Running] = {}

    @property
    def busy(self) -> bool:
        """Whether any runs."""
        return bool(self._running)

    def begin(self, spec: training_pb2.OperationSpec, planned: worker_pb2.PlannedOperation) -> None:
        """Begins an operation that was claimed, on the weights of this moment.

        Raises:
            TenSafeFault: it cannot be served; it does not run.
        """
        request, key = self._execution.sample_request(spec, planned)
        self._sampler.submit(
            planned.operation_id, key, request, self._teller(planned) if request.stream else None
        )
        self._running[planned.operation_id] = _Running(planned, spec.run_id, self._limits.of(spec))

    def _teller(self, planned: worker_pb2.PlannedOperation) -> Callable[[SampleChunk], None]:
        return lambda chunk: self._progress.stream(planned, chunk)

    def step(self) -> bool:
        """Stops what is to be stopped, carries the others on, tells what has ended; whether
        anything has."""
        before = len(self._running)
        self._stop()
        if self._running:
            self._carry_on()
        return len(self._running) < before

    def _carry_on(self) -> None:
        # A step works for all of them: the one that may take longest says when it hangs.
        longest = max(self._running.values(), key=lambda running: running.limit_s)
        self._activity.begin(longest.planned.operation_id, longest.run_id, longest.limit_s)
        outcomes: list[tuple[str, SampleOutcome | Exception]]
        try:
            self._sampler.step()
            outcomes = self._sampler.collect()
        except Exception as error:
            # Whose fault it was is not known, and none may be left to hang.
            outcomes = [(operation_id, error) for operation_id in self._running]
            for operation_id in self._running:
                self._sampler.cancel(operation_id)
        finally:
            self._activity.end()
        for operation_id, outcome in outcomes:
            # Told before it is taken out: who finds nothing running finds all outcomes there.
            self._end(self._running[operation_id].planned, outcome)
            del self._running[operation_id]

    def _stop(self) -> None:
        for planned in self._progress.stops():
            self._sampler.cancel(planned.operation_id)
            self._progress.end([cancelled(planned)])
            del self._running[planned.operation_id]

    def drop_run(self, run_id: str) -> None:
        """Gives up a run's operations: the run is no longer here, or under a new assignment."""
        for running in [one for one in self._running.values() if one.planned.epoch]:
            if running.run_id == run_id:
                self._sampler.cancel(running.planned.operation_id)
                del self._running[running.planned.operation_id]
                self._progress.abandon(running.planned)

    def _end(
        self, planned: worker_pb2.PlannedOperation, outcome: SampleOutcome | Exception
    ) -> None:
        done = worker_pb2.OperationDone(operation_id=planned.operation_id, epoch=planned.epoch)
        try:
            if isinstance(outcome, Exception):
                raise outcome
            done.compute_ms = outcome.compute_ms
            done.result.CopyFrom(wire.sample_result(outcome))
            check_size(done)
        except Exception as error:
            fail(done, error, planned)
        self._progress.end([done])
