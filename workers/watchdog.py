"""Ends the process when an operation hangs, so that whoever keeps it can start it again.

Two clocks watch the executor. A thread of Python knows the operation and its limit. Should code
that holds the interpreter's lock hang, that thread hangs with it; a timer of `faulthandler`, which
needs no lock and which the thread keeps winding up, goes off then. Both write every thread's stack
to stderr first.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from tensafe.v1 import training_pb2

log = logging.getLogger(__name__)

EXIT_HUNG = 75
_CHECK_S = 0.5


@dataclass(frozen=True, slots=True)
class OperationLimits:
    """How long one operation may run: `base_s + per_token_ms · tokens`.

    Taking on a run, and saving and loading one, have the base alone.
    """

    base_s: float = 600.0
    per_token_ms: float = 50.0

    def of(self, spec: training_pb2.OperationSpec) -> float:
        """The limit of an operation, seconds."""
        return self.of_tokens(tokens_of(spec))

    def of_tokens(self, tokens: int) -> float:
        """The limit of an operation of so many tokens, seconds."""
        return self.base_s + self.per_token_ms * tokens / 1e3


def tokens_of(spec: training_pb2.OperationSpec) -> int:
    """Tokens that an operation reads or may write."""
    kind = spec.WhichOneof("operation")
    if kind in ("forward", "forward_backward"):
        return len(getattr(spec, kind).batch.inline.input_tokens.data) // 4
    if kind == "sample":
        params = spec.sample.params
        longest = params.max_tokens if params.HasField("max_tokens") else 128
        # A prompt's tokens are fewer than its bytes.
        read = sum(prompt.ByteSize() for prompt in spec.sample.prompts)
        return read + longest * max(1, params.num_samples) * len(spec.sample.prompts)
    return 0


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the executor does.

    Attributes:
        operation_id: the operation; empty while a run is taken on.
        limit_s: how long it may take.
        began_s: when it began, on `time.monotonic`'s clock.
    """

    operation_id: str
    run_id: str
    limit_s: float
    began_s: float

    @property
    def running_s(self) -> float:
        return time.monotonic() - self.began_s


class StepClock:
    """How long a step has been seen to run.

    Between two looks at most `most_s` counts, so that time in which the whole process stood still
    (SIGSTOP, a suspended machine) does not.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._seen: Step | None = None
        self._observed_s = 0.0
        self._looked_s = time.monotonic()

    def look(self, step: Step | None) -> float:
        """Seconds for which `step` has been there; 0 at the first look."""
        now = time.monotonic()
        passed_s, self._looked_s = min(now - self._looked_s, self._most_s), now
        same = step is not None and step is self._seen
        self._observed_s = self._observed_s + passed_s if same else 0.0
        self._seen = step
        return self._observed_s


class Activity:
    """What the executor is at: written by its thread, read by others.

    Attributes:
        step: None while it is idle.
    """

    def __init__(self) -> None:
        self.step: Step | None = None

    def begin(self, operation_id: str, run_id: str, limit_s: float) -> None:
        self.step = Step(operation_id, run_id, limit_s, time.monotonic())

    def end(self) -> None:
        self.step = None


class Watchdog:
    """Watches one executor's activity."""

    def __init__(
        self,
        activity: Activity,
        *,
        frozen_limit_s: float,
        check_s: float = _CHECK_S,
        bite: Callable[[Step, float], None] | None = None,
    ) -> None:
        self._activity = activity
        self._frozen_limit_s = frozen_limit_s
        self._check_s = check_s
        self._bite = bite or end_process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tensafe-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        clock = StepClock(2 * self._check_s)
        while True:
            faulthandler.dump_traceback_later(self._frozen_limit_s, exit=True)
            if self._stopped.wait(self._check_s):
                return
            step = self._activity.step
            observed_s = clock.look(step)
            if step is not None and observed_s > step.limit_s:
                self._bite(step, observed_s)


def end_process(step: Step, observed_s: float) -> None:
    """Says why, writes every thread's stack to stderr, and ends the process with EXIT_HUNG."""
    what = f"operation {step.operation_id}" if step.operation_id else "taking on a run"
    log.critical(
        "%s of run %s has been running for %.1f s, its limit is %.1f s: ending this process, so "
        "that its runs go on elsewhere. Raise --operation-limit-s or --token-limit-ms if it was "
        "only slow",
        *(what, step.run_id or "-", observed_s, step.limit_s),
    )
    end_with_stacks()


def end_with_stacks() -> NoReturn:
    """Writes every thread's stack to stderr, and ends the process with EXIT_HUNG."""
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)
