"""Named places where a test makes a process die, stall or fail. Without effect unless armed.

    TENSAFE_FAILPOINTS="after-dispatch=kill@3;before-commit=delay:0.5@1+"
    TENSAFE_FAILPOINTS_ONCE=/some/directory

Each point is armed as `NAME=ACTION[@N]`. The action is `kill` (SIGKILL to this process), `error`
(raises `FailpointError`) or `delay:SECONDS` (blocks the thread that comes by). `@N` means the N-th
time that this process comes by, `@N+` that time and each one after; left out, it is `@1`.

With `TENSAFE_FAILPOINTS_ONCE`, a point acts at most once for all processes that share the
directory: it leaves a file of its name there first. So a process that was killed is not killed
again by the same point when it is restarted, and the file shows that the point was hit.

Only who sets a process's environment can arm a point; nothing that a tenant sends can.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TENSAFE_FAILPOINTS"
ONCE_VARIABLE = "TENSAFE_FAILPOINTS_ONCE"

POINTS = {
    "before-commit": "coordinator: submitted operations are written, their transaction is open",
    "after-commit-before-reply": "coordinator: submitted operations are on disk, nobody was told",
    "after-dispatch": "coordinator: a plan was handed to a worker's stream",
    "mid-step": "worker: a forward_backward or optim_step has changed the run, nobody was told",
    "mid-group": "worker: several runs' operations were computed as one pass, nobody was told",
    "mid-snapshot-write": "worker: a snapshot's files are written, nothing of it was sent",
    "mid-migration": "coordinator: a migration of the store is executed, not committed",
    "mid-snapshot": "coordinator: a snapshot's files are stored, neither manifest nor row is",
    "mid-private-step": "worker: the state after a private step is written, nothing of it was sent",
    "mid-charge": "coordinator: a private step's charge is written, its transaction is open",
    "after-charge": "coordinator: a charge is on disk, its step was sent to nobody",
    "after-private-snapshot": "coordinator: the state after a private step is on disk, the worker "
    "was not told",
    "after-private-commit": "coordinator: a private step is committed, nobody was told",
    "after-result-before-commit": "coordinator: outcomes have arrived, none of them is on disk",
}
"""Every point, and what is true there."""

_RULE = re.compile(
    r"(?P<name>[a-z-]+)=(?P<action>kill|error|delay:(?P<delay>\d+(\.\d+)?))"
    r"(@(?P<at>[1-9]\d*)(?P<on>\+?))?"
)


class FailpointError(RuntimeError):
    """Raised by a point that is armed with `error`."""


class FailpointSyntaxError(ValueError):
    """`TENSAFE_FAILPOINTS` cannot be read, or names a point that does not exist."""


@dataclass(slots=True)
class _Armed:
    action: str
    delay_s: float
    at: int
    onwards: bool
    hits: int = 0

    @property
    def due(self) -> bool:
        return self.hits == self.at or (self.onwards and self.hits > self.at)


def hit(name: str) -> None:
    """Acts if the point is armed; else costs one look at an empty dict."""
    if _armed:
        _come_by(name)


def warn_if_armed(log: logging.Logger) -> None:
    """Says in the log which points are armed, since none ever should be in service."""
    if _armed:
        log.warning("%s is set: this process will fail on purpose at %s", VARIABLE, sorted(_armed))


def parse(text: str) -> dict[str, _Armed]:
    """Reads the variable's value.

    Raises:
        FailpointSyntaxError: for anything but a list of known points and actions.
    """
    armed = {}
    for rule in filter(None, (part.strip() for part in text.split(";"))):
        match = _RULE.fullmatch(rule)
        if match is None:
            raise FailpointSyntaxError(
                f"{VARIABLE}: {rule!r} is not NAME=kill|error|delay:SECONDS[@N[+]]"
            )
        if match["name"] not in POINTS:
            raise FailpointSyntaxError(
                f"{VARIABLE}: no failpoint {match['name']!r}; there are {', '.join(POINTS)}"
            )
        armed[match["name"]] = _Armed(
            match["action"].partition(":")[0],
            float(match["delay"] or 0),
            int(match["at"] or 1),
            bool(match["on"]),
        )
    return armed


def _come_by(name: str) -> None:
    point = _armed.get(name)
    if point is None:
        return
    point.hits += 1
    if not point.due or not _first(name):
        return
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif point.action == "delay":
        time.sleep(point.delay_s)
    else:
        raise FailpointError(f"failpoint {name}")


def _first(name: str) -> bool:
    if not _once:
        return True
    try:
        (Path(_once) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _from(environment: Mapping[str, str]) -> tuple[dict[str, _Armed], str]:
    return parse(environment.get(VARIABLE, "")), environment.get(ONCE_VARIABLE, "")


_armed, _once = _from(os.environ)
