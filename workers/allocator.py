"""The C library's memory allocator, as tensors need it."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress

_VARIABLE = "GLIBC_TUNABLES"
_SETTINGS = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.arena_max": "1",
    "glibc.malloc.mmap_threshold": str(32 << 20),  # the most; without it the next one lowers it
    "glibc.malloc.trim_threshold": str(1 << 30),
}
_OLDER_NAMES = {
    "glibc.malloc.arena_max": "MALLOC_ARENA_MAX",
    "glibc.malloc.mmap_threshold": "MALLOC_MMAP_THRESHOLD_",
    "glibc.malloc.trim_threshold": "MALLOC_TRIM_THRESHOLD_",
}
_STARTED_ANEW = "TENSAFE_STARTED_ANEW"


def suited(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process's tensors reuse the memory of those that are gone.

    torch asks glibc for aligned memory, of which some bytes are cut off before each tensor. Those
    rest in a cache of each thread, in use as far as the heap knows, so that a tensor's place is
    never whole again and one of the same size finds no room in it. So there is no such cache.

    A thread that is not the first has a heap of its own, of small pieces that glibc gives back to
    the system as they get free: the thread that computes would have them zeroed and mapped anew
    with each step, 0.8 GB of it for 8 x 256 tokens of SmolLM2-135M. So all have one heap, and of
    that a step's memory is kept for the next.

    Values that somebody has set stay.
    """
    found = dict(environment)
    set_before = found.get(_VARIABLE, "")
    own = [
        f"{name}={value}"
        for name, value in _SETTINGS.items()
        if name not in set_before and _OLDER_NAMES.get(name, "") not in environment
    ]
    if own:
        found[_VARIABLE] = ":".join(filter(None, [set_before, *own]))
    return found


def restart_suited() -> None:
    """Starts this process's program anew, under the same pid, unless its environment is suited.

    glibc reads its settings once, before the program begins. It takes them out of the environment
    of an interpreter with capabilities of its own, which goes on without them. So does a process
    that cannot be started anew: a child of `multiprocessing`, whose program is its parent's, or one
    of an interpreter that does not know where it lies.
    """
    pid = str(os.getpid())
    if platform.libc_ver()[0] != "glibc" or os.environ.get(_STARTED_ANEW) == pid:
        return
    if multiprocessing.parent_process() is not None or not sys.executable:
        return
    environment = suited(os.environ)
    if environment != dict(os.environ):
        own = [sys.executable, *sys.orig_argv[1:]]
        environment[_STARTED_ANEW] = pid
        with suppress(OSError):
            os.execve(sys.executable, own, environment)  # noqa: S606 - what already runs
