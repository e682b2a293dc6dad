"""Which outcomes are told now, and which wait for the state after a private update.

Everything here happens on the executor's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensafe.v1 import worker_pb2
from tensafe.wire.status import TenSafeFault, to_status
from workers.backend import Backend
from workers.failures import as_fault
from workers.private_steps import Ended, PrivateStep, PrivateSteps
from workers.progress import Progress


class Telling:
    """Tells outcomes; that of a private update when the state after it is on disk, and behind it
    those of the run's later operations.

    Args:
        private: stores those states; one that is stored comes back through `stored`.
        on_lost: called with a run that has moved in a way that can never be told: it is to begin
            anew from before that.
    """

    def __init__(
        self,
        backend: Backend,
        progress: Progress,
        private: PrivateSteps,
        on_lost: Callable[[worker_pb2.RefusedSnapshot], None],
    ) -> None:
        self._backend = backend
        self._progress = progress
        self._private = private
        self._on_lost = on_lost

    def end(self, ended: Sequence[Ended]) -> None:
        """These have ended. What is not told yet runs on, for whoever asks."""
        told = []
        for item in ended:
            waiting = self._private.open_step(item.spec.run_id)
            if waiting is not None:
                waiting.behind.append(item)
            elif item.planned.HasField("charge") and item.done.result.optim_step.applied:
                self._store(item)
            else:
                told.append(item.done)
        self._progress.end(told)

    def stored(self, step: PrivateStep) -> None:
        """The state after an update is on disk or, if the step has a fault, will never be."""
        if not self._private.take(step):
            return
        if step.fault is None:
            self._progress.end([item.done for item in step.all])
        else:
            self._lose(step.all, step.fault)

    def forget(self, run_id: str) -> None:
        """The run is another worker's, or this one's anew: nobody waits for what it has done."""
        self._progress.forget(run_id)
        step = self._private.forget(run_id)
        for item in step.all if step is not None else []:
            self._progress.abandon(item.planned)

    def _store(self, item: Ended) -> None:
        run_id = item.spec.run_id
        try:
            captured = self._backend.capture(run_id)
        except Exception as error:
            self._lose([item], as_fault(error, f"keeping the state of {run_id}"))
        else:
            self._private.put(PrivateStep(item, captured))

    def _lose(self, items: Sequence[Ended], fault: TenSafeFault) -> None:
        for item in items:
            self._progress.abandon(item.planned)
        first = items[0]
        self._on_lost(
            worker_pb2.RefusedSnapshot(
                run_id=first.spec.run_id,
                epoch=first.planned.epoch,
                error=to_status(fault.detail),
            )
        )
