"""Where the time of a step goes, by the file that asks for an operation."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine import (
    Setting,
    Step,
    in_turn,
    one_rows,
    open_runs,
    tenants_rows,
    together,
    warm_ups,
)

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear", "_grouped_mm"}
_ROOM = re.compile(
    r"(?:.*/)?((?:workers/engine|transformers|torch/optim)/[\w/]+\.py)\(\d+\): (\w+)"
)
_LED_THROUGH = {"dividing.py"}
_BACKWARD = ("scoring.py", "backward")
"""Innermost where autograd itself computes."""
_TENANTS, _TOKENS = 8, 16
_AUTOGRAD, _ELSEWHERE = "autograd", "elsewhere"
_LEAST_SHARE = 0.002
_STEPS = 3


def measure(setting: Setting) -> dict[str, list[float]]:
    """Seconds of operations in a step, by `profile/CELL/ROOM/KIND`, of the device where that is a
    GPU; `profile/CELL/step` is what a step takes when nobody looks.

    A room is the innermost file of the engine or of `transformers`, or autograd, which goes back
    through what they ask for without a way back of its own; a kind is products or the rest.
    What Python and torch take between operations is what is missing to the step.
    """
    found: dict[str, list[float]] = {}
    with open_runs(setting, _TENANTS) as names:
        rows = tenants_rows(setting, _TENANTS, _TOKENS)
        cells: dict[str, Step] = {
            name: lambda own=own: in_turn(setting.backend, names[:1], [own])
            for name, own in one_rows(setting).items()
        }
        cells[f"{_TENANTS}x{_TOKENS}"] = lambda: together(setting.backend, names, rows)
        for cell, step in cells.items():
            for (room, kind), seconds in _rooms(step).items():
                found[f"profile/{cell}/{room}/{kind}"] = [seconds]
            found[f"profile/{cell}/step"] = [_clocked(setting, step) for _ in range(_STEPS)]
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Of each cell, the shares of all operations' time, the largest first; and that of the step
    which operations take."""
    result: dict[str, float] = {}
    for cell in sorted({name.split("/")[1] for name in found}):
        own = {
            name: seconds[0]
            for name, seconds in found.items()
            if name.startswith(f"profile/{cell}/") and not name.endswith("/step")
        }
        whole = sum(own.values())
        shares = Counter({name: seconds / whole for name, seconds in own.items()})
        kept = {name: share for name, share in shares.most_common() if share >= _LEAST_SHARE}
        result |= kept | {f"profile/{cell}/all others": 1 - sum(kept.values())}
        steps = sorted(found[f"profile/{cell}/step"])
        result[f"profile/{cell} operations/step"] = whole / steps[len(steps) // 2]
    return result


def _clocked(setting: Setting, step: Step) -> float:
    begin = setting.clock()
    step()
    return setting.clock() - begin


def _rooms(step: Step) -> Counter[tuple[str, str]]:
    """Seconds of one step's operations by room and kind."""
    for _ in range(warm_ups()):
        step()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, with_stack=True) as seen:
        step()
    found: Counter[tuple[str, str]] = Counter()
    for event in seen.events() or []:
        _, own, operation = event.name.partition("aten::")
        if own:
            taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kind = "products" if operation in _PRODUCTS else "the rest"
            found[_room(event), kind] += taken / 1e6
    return found


def _room(event: Any) -> str:
    while event is not None:
        met = _ROOM.match(event.name)
        room = met[1].removeprefix("workers/engine/") if met else ""
        if met and room not in _LED_THROUGH:
            return _AUTOGRAD if (room, met[2]) == _BACKWARD else room
        event = event.cpu_parent
    return _ELSEWHERE
