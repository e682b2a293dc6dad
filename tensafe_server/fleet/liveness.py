"""Noticing that a worker is dead, frozen or cut off: heartbeats both ways, and a limit to silence.

Nothing of this lies on an operation's way: each worker costs one timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from google.protobuf.duration_pb2 import Duration

from tensafe.v1 import worker_pb2 as pb
from tensafe_server.fleet.link import WorkerLink

log = logging.getLogger(__name__)

_BEATS_PER_LIMIT = 4
_HEARTBEAT = pb.ConnectResponse(heartbeat=pb.CoordinatorHeartbeat())


class Liveness:
    """Listens for workers, and is heard by them.

    Args:
        silence_limit_s: a worker that says nothing for so long is taken for dead.

    Attributes:
        on_dead: called with a worker taken for dead and why; once for each.
        on_hung: called with a worker that is at something far beyond its limit, what that is, and
            why; its watchdog, which should have ended it, has failed.
    """

    def __init__(self, silence_limit_s: float) -> None:
        self._limit_s = silence_limit_s
        self._interval_s = silence_limit_s / _BEATS_PER_LIMIT
        self.on_dead: Callable[[WorkerLink, str], None] = lambda link, why: None
        self.on_hung: Callable[[WorkerLink, pb.Executing, str], None] = lambda link, at, why: None

    def welcome(self, link: WorkerLink) -> pb.Welcome:
        """The greeting, with the rhythm that both sides keep."""
        return pb.Welcome(
            worker_id=link.id,
            heartbeat_interval=_duration(self._interval_s),
            silence_limit=_duration(self._limit_s),
        )

    def watch(self, link: WorkerLink) -> None:
        """Begins to listen; ends by itself when the link is closed."""
        link.heard()
        self._arm(link)

    def beat(self, link: WorkerLink, heartbeat: pb.WorkerHeartbeat) -> None:
        """Takes a heartbeat in."""
        if not heartbeat.HasField("executing"):
            return
        at = heartbeat.executing
        running_s, limit_s = at.running.ToNanoseconds() / 1e9, at.limit.ToNanoseconds() / 1e9
        if running_s > limit_s + self._limit_s and not link.closed:
            what = at.operation_id or f"taking on {at.run_id}"
            why = f"{what} has been running for {running_s:.0f} s, its limit is {limit_s:.0f} s"
            self.on_hung(link, at, why)

    def _arm(self, link: WorkerLink) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval_s
        loop.call_at(due, self._tick, link, due)

    def _tick(self, link: WorkerLink, due: float) -> None:
        if link.closed:
            return
        now = asyncio.get_running_loop().time()
        if link.receiving or now - due > self._interval_s:
            # We were busy or frozen ourselves: what it sent meanwhile has not been read.
            link.heard()
        silent_s = now - link.last_heard_s
        if silent_s >= self._limit_s:
            self.on_dead(link, f"nothing was heard from it for {silent_s:.1f} s")
            return
        link.send(_HEARTBEAT)
        self._arm(link)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
