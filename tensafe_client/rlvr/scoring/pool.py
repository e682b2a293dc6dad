"""Processes that score completions, killed and started anew when one takes too long or dies.

They are started as `python -m …`, not forked (this process has gRPC's threads) and not by
`multiprocessing`, whose spawned children run the caller's main script again.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tensafe_client.checks import check_count, check_seconds
from tensafe_client.errors import ConfigError, MissingExtraError
from tensafe_client.rlvr.environments.base import Environment, Problem, Reply
from tensafe_client.rlvr.scoring.pipes import PipeClosedError, Pipes, packed


@dataclass(frozen=True)
class Failure:
    """A reply that did not come.

    Attributes:
        kind: "error", "timeout" or "crash" (the process ended).
        message: the exception, or what happened.
    """

    kind: str
    message: str


class ScoringPool:
    """Scores many completions at once.

    Args:
        environment: sent to the processes by `cloudpickle`.
        processes: how many.
        timeout_s: most time for one reply, seconds; then its process is killed.
        start_timeout_s: most time for a process to import and unpickle the environment.

    Raises:
        MissingExtraError: if the extra `tensafe[rlvr]` is not installed.
        ConfigError: if the environment cannot be pickled.
    """

    def __init__(
        self,
        environment: Environment,
        processes: int = 2,
        timeout_s: float = 10.0,
        start_timeout_s: float = 120.0,
    ) -> None:
        if check_count("processes", processes) < 1:
            raise ConfigError.of("processes", "must be 1 or more")
        self._timeout_s = check_seconds("timeout_s", timeout_s)
        self._start_timeout_s = check_seconds("start_timeout_s", start_timeout_s)
        try:
            self._environment = packed(environment)
        except ImportError as error:
            raise MissingExtraError.of("scoring rewards in processes", "rlvr") from error
        except Exception as error:
            raise ConfigError.of(
                "environment", f"cannot be sent to another process: {error}"
            ) from error
        self._free: queue.SimpleQueue[_Scorer | None] = queue.SimpleQueue()
        for _ in range(processes):
            self._free.put(None)
        self._running: set[_Scorer] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tensafe-scoring")
        self._closed = False

    def submit(self, problem: Problem, completions: Sequence[str]) -> Future[Reply | Failure]:
        """Begins to score; the future never raises."""
        return self._threads.submit(self._score, problem, list(completions))

    def close(self) -> None:
        """Kills the processes; what is being scored ends as a crash."""
        self._closed = True
        with self._lock:
            for scorer in self._running:
                scorer.kill()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _score(self, problem: Problem, completions: list[str]) -> Reply | Failure:
        scorer = self._free.get()
        try:
            if scorer is None:
                scorer = self._start()
            outcome: Reply | Failure = scorer.ask(packed((problem, completions)), self._timeout_s)
        except TimeoutError:
            outcome = Failure("timeout", f"no reward within {self._timeout_s:g} s")
        except PipeClosedError:
            outcome = Failure("crash", "the process that computed it ended")
        except _StartError as error:
            outcome = Failure("error", str(error))
        except Exception as error:  # a problem that cannot be pickled, for one
            outcome = Failure("error", f"{type(error).__name__}: {error}")
        lost = isinstance(outcome, Failure) and outcome.kind != "error"
        if scorer is not None and lost:
            self._end(scorer)
            scorer = None
        self._free.put(scorer)
        return outcome

    def _start(self) -> _Scorer:
        scorer = _Scorer()
        with self._lock:
            self._running.add(scorer)
            if self._closed:
                scorer.kill()
        try:
            told = scorer.ask(self._environment, self._start_timeout_s)
        except (TimeoutError, PipeClosedError) as error:
            self._end(scorer)
            raise _StartError(
                f"no scoring process was ready within {self._start_timeout_s:g} s; what it said is "
                "on standard error"
            ) from error
        if isinstance(told, Failure):
            self._end(scorer)
            raise _StartError(f"the environment cannot be loaded there: {told.message}")
        return scorer

    def _end(self, scorer: _Scorer) -> None:
        scorer.kill()
        with self._lock:
            self._running.discard(scorer)


class _StartError(Exception):
    """No process could be made ready."""


class _Scorer:
    """One process, and the pipes to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensafe_client.rlvr.scoring.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its own imports must find what ours find.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = Pipes(self._process.stdout.fileno(), self._process.stdin.fileno())

    def ask(self, request: bytes, timeout_s: float) -> Any:
        """Sends a packed request and waits for its answer.

        Raises:
            TimeoutError, PipeClosedError: if none comes.
        """
        self._pipes.send(request, timeout_s)
        return self._pipes.receive(timeout_s)

    def kill(self) -> None:
        """Ends it, and what its rewards have started: they are a group of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
