"""How many CPU threads a worker takes when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

_MOST = 16
"""Beyond this, matrix products of one LoRA step gain nothing and barriers cost."""


def pick_threads(workers_on_machine: int) -> int:
    """An equal share of the cores that this process may use, from 1 to 16.

    Two workers whose threads overlap wait for each other at every barrier: measured, two threads
    on two busy cores were 3 to 5 times slower than one.
    """
    return max(1, min(_MOST, usable_cores() // workers_on_machine))


def usable_cores() -> int:
    """Cores of this process's affinity mask, within its container's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup/cpu.max"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(path: Path) -> float | None:
    """The cgroup's quota in cores (`cpu.max` holds `QUOTA PERIOD`, µs); None without one."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
