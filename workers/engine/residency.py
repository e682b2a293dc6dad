"""Runs in memory; when they take more than their share, idle ones wait on disk."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from workers.engine import checkpoints
from workers.engine.memory import memory_faults
from workers.engine.run import Run
from workers.operations import RunSettings

log = logging.getLogger(__name__)

_IDLE_S = 60.0
"""Without an operation: longer than runs wait for each other that take turns, which would come back
with every step."""
_MOST = 1.5
"""Times its share that what is not idle may take."""


class Residency:
    """The runs of one worker, by id; a run that was set aside comes back when it is asked for.

    Setting aside and coming back change no bit of a run.

    Args:
        limit_bytes: what runs may take in memory before idle ones are set aside; beyond half as
            much again the one idle longest is, however short that is. Those at work may exceed it.
        renew: makes a fresh run of an id and settings.
        fingerprint: for the files' own record.
        clock: seconds.
    """

    def __init__(
        self,
        limit_bytes: int,
        renew: Callable[[str, RunSettings], Run],
        fingerprint: Callable[[], dict[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._used_s: dict[str, float] = {}
        self._last: list[str] = []
        self._renew = renew
        self._fingerprint = fingerprint
        self._resident: OrderedDict[str, Run] = OrderedDict()
        self._aside: dict[str, tuple[RunSettings, Path]] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="tensafe-runs-")

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._resident or run_id in self._aside

    def __getitem__(self, run_id: str) -> Run:
        (run,) = self.take([run_id])
        if isinstance(run, Exception):
            raise run
        return run

    def __setitem__(self, run_id: str, run: Run) -> None:
        self._drop(run_id)
        self._resident[run_id] = run
        self._used_s[run_id] = self._clock()
        self._make_room({run_id})

    def take(self, run_ids: Iterable[str]) -> list[Run | Exception]:
        """These runs, all in memory together; in place of one that cannot be there, why."""
        wanted = list(run_ids)
        # Those of the call before have been at work until now at most.
        self._used_s.update({each: self._clock() for each in self._last if each in self._resident})
        self._last = wanted
        runs: list[Run | Exception] = []
        for run_id in wanted:
            try:
                runs.append(self._at_hand(run_id))
            except Exception as error:
                runs.append(error)
        self._make_room(set(wanted))
        return runs

    def pop(self, run_id: str) -> None:
        """Forgets a run; an unknown one is no error."""
        self._drop(run_id)

    @property
    def resident(self) -> list[str]:
        """Ids of those in memory, the one idle longest first."""
        return list(self._resident)

    def _at_hand(self, run_id: str) -> Run:
        if run_id in self._aside:
            with memory_faults("run"):
                self._bring_back(run_id)
        self._resident.move_to_end(run_id)
        self._used_s[run_id] = self._clock()
        return self._resident[run_id]

    def _make_room(self, at_work: set[str]) -> None:
        taken = sum(state_bytes(run) for run in self._resident.values())
        idle_since_s = self._clock() - _IDLE_S
        for run_id in [each for each in self._resident if each not in at_work]:
            is_idle = self._used_s[run_id] <= idle_since_s
            if taken <= self._limit_bytes * (1 if is_idle else _MOST):
                return
            taken -= state_bytes(self._resident[run_id])
            if not self._set_aside(run_id):
                return

    def _set_aside(self, run_id: str) -> bool:
        run = self._resident[run_id]
        directory = Path(self._directory.name) / secrets.token_hex(8)
        try:
            directory.mkdir()
            checkpoints.capture(run, True, self._fingerprint()).write(directory)
        except Exception as error:  # of the disk, in the words of whichever library wrote; memory
            log.warning("run %s stays in memory beyond its limit: %s", run_id, error)
            shutil.rmtree(directory, ignore_errors=True)
            return False
        del self._resident[run_id]
        self._aside[run_id] = (run.settings, directory)
        log.info("set run %s aside", run_id)
        return True

    def _bring_back(self, run_id: str) -> None:
        settings, directory = self._aside[run_id]
        run = self._renew(run_id, settings)
        checkpoints.load(run, directory, include_optimizer=True)
        self._resident[run_id] = run
        del self._aside[run_id]
        shutil.rmtree(directory, ignore_errors=True)

    def _drop(self, run_id: str) -> None:
        self._resident.pop(run_id, None)
        self._used_s.pop(run_id, None)
        if run_id in self._aside:
            shutil.rmtree(self._aside.pop(run_id)[1], ignore_errors=True)


def state_bytes(run: Run) -> int:
    """Memory of a run's weights, accumulated gradient, optimizer state and drawn noise."""
    held = [run.adapter.weights, run.accumulator, *run.optimizer.state().values()]
    noise = 0 if run.private is None else run.private.held_bytes
    return noise + sum(tensor.nbytes for tensor in held if tensor is not None)
