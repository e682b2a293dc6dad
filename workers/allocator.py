"""The C library's memory allocator, as tensors need it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
_STARTED_ANEW = "TENSAFE_STARTED_ANEW"


def suited(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process's tensors reuse the memory of those that are gone.

    torch asks glibc for aligned memory, of which some bytes are cut off before each tensor. Those
    rest in a cache of each thread, in use as far as the heap knows, so that a tensor's place is
    never whole again and one of the same size finds no room in it. Without that cache a step of
    8 x 128 tokens of SmolLM2-135M takes 1.40 GB instead of 1.75, in the same time.

    A value that somebody has set stays.
    """
    found = dict(environment)
    set_before = found.get(_VARIABLE, "")
    if _SETTING not in set_before:
        found[_VARIABLE] = ":".join(filter(None, [set_before, f"{_SETTING}=0"]))
    return found


def restart_suited() -> None:
    """Starts this process's program anew, under the same pid, unless its environment is suited.

    glibc reads its settings once, before the program begins. It takes them out of the environment
    of an interpreter with capabilities of its own, which goes on without them.
    """
    pid = str(os.getpid())
    if platform.libc_ver()[0] != "glibc" or os.environ.get(_STARTED_ANEW) == pid:
        return
    environment = suited(os.environ)
    if environment != dict(os.environ):
        own = [sys.executable, *sys.orig_argv[1:]]
        environment[_STARTED_ANEW] = pid
        os.execve(sys.executable, own, environment)  # noqa: S606 - what already runs
