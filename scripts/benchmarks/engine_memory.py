"""Peak memory of training steps, each side and cell in a process of its own, and of a run more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from workers.allocator import suited

if TYPE_CHECKING:
    from benchmarks.models import Choice

_HERE = Path(__file__).resolve().parent
_CELLS = ("mixed", "equal")
_MOST_ROUNDS = 3
_STEPS = 3
"""Of a process at least: the first step makes the optimizer's state, and a heap grows for some."""
_MORE_RUNS = 8


def measure(choice: Choice, dropout: float, rounds: int) -> dict[str, list[float]]:
    """Bytes by `WHAT/SIDE`: of the whole process, and of the device where that is a GPU. At most
    three rounds, since they differ little.

    The engine has its worker's allocator setting; the plain loop runs without and with it.
    """
    found: dict[str, list[float]] = {}
    ours = suited(os.environ)
    sides = (
        ("engine", "engine", ours),
        ("plain", "plain", dict(os.environ)),
        ("suited plain", "plain", ours),
    )
    for _, cell, (name, side, environment) in product(
        range(min(rounds, _MOST_ROUNDS)), _CELLS, sides
    ):
        arguments = [side, cell, json.dumps(asdict(choice)), str(dropout)]
        command = [sys.executable, "-m", "benchmarks.engine_memory", *arguments]
        done = subprocess.run(
            command, cwd=_HERE.parent, env=environment, stdout=subprocess.PIPE, check=True
        )
        for what, value in json.loads(done.stdout.splitlines()[-1]).items():
            found.setdefault(f"memory/{what}/{name}", []).append(value)
    return found


def ratios(peaks: dict[str, list[float]]) -> dict[str, float]:
    """Of medians of peaks, and of what a run more takes to its adapter and optimizer state."""
    value = {name: median(values) for name, values in peaks.items()}
    found = {}
    for cell in _CELLS:
        ours, theirs, suited_theirs = (
            value[f"memory/{cell} peak/{side}"] for side in ("engine", "plain", "suited plain")
        )
        found[f"one/{cell} peak engine/plain"] = ours / theirs
        found[f"one/{cell} peak engine/plain with its allocator"] = ours / suited_theirs
        ours, theirs = (value[f"memory/{cell} above model/{side}"] for side in ("engine", "plain"))
        found[f"one/{cell} peak above the loaded model engine/plain"] = ours / theirs
    run, state = value["memory/run more/engine"], value["memory/run state/engine"]
    found["memory of a run more / its adapter and optimizer"] = run / state
    return found


def _engine(choice: Choice, dropout: float, rows: dict[str, Any]) -> dict[str, float]:
    from workers.operations import LoraSettings, RunSettings, StepRequest

    backend = choice.backend()
    settings = RunSettings(choice.model, lora=LoraSettings(dropout=dropout), seed=1)

    def step(name: str, batch: Any) -> None:
        backend.forward_backward(name, 1, batch.ours)
        backend.optim_step(name, StepRequest())

    backend.open_run("one", settings, None)
    found = peaks({cell: lambda batch=batch: step("one", batch) for cell, batch in rows.items()})
    before = _resident()
    for index in range(_MORE_RUNS):
        backend.open_run(f"more-{index}", settings, None)
        step(f"more-{index}", next(iter(rows.values())))
    weights = backend._runs["one"].adapter.weights.nbytes
    found["run more"] = (_resident() - before) / _MORE_RUNS
    # AdamW: the weights and two moments.
    found["run state"] = 3 * weights
    return found


def _plain(choice: Choice, dropout: float, rows: dict[str, Any]) -> dict[str, float]:
    from benchmarks.engine import plain_loop

    step = plain_loop(choice.plain(), dropout, 1)
    return peaks({cell: lambda batch=batch: step([batch]) for cell, batch in rows.items()})


def peaks(steps: dict[str, Any]) -> dict[str, float]:
    """Bytes of some steps at most, `CELL peak`, and above what was there, `CELL above model`."""
    from benchmarks.engine import warm_ups

    found = {}
    for cell, step in steps.items():
        loaded = _held()
        _forget_peak()
        for _ in range(max(_STEPS, warm_ups())):
            step()
        found[f"{cell} peak"] = _peak()
        found[f"{cell} above model"] = _peak() - loaded
    return found


def _resident() -> float:
    """What tensors take on a GPU, or the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated())
    _trim()
    return _status("VmRSS")


def _held() -> float:
    """The same with what a GPU's allocator keeps from others: captured passes are in that."""
    import torch

    if not torch.cuda.is_available():
        return _resident()
    torch.cuda.empty_cache()
    return float(torch.cuda.memory_reserved())


def _peak() -> float:
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved())
    return _status("VmHWM")


def _forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _trim() -> None:
    """What the allocator keeps for later is nobody's."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _main() -> None:
    import torch

    from benchmarks.engine_rows import MIXED, make_rows
    from benchmarks.models import Choice

    side, cell, choice, dropout = sys.argv[1:]
    own = Choice(**json.loads(choice))
    torch.set_num_threads(own.threads)
    known = own.vocabulary
    rows = {"mixed": make_rows(MIXED, 0.6, known), "equal": make_rows([128] * 8, 0.0, known)}
    measure_side = _engine if side == "engine" else _plain
    print(json.dumps(measure_side(own, float(dropout), {cell: rows[cell]})))


if __name__ == "__main__":
    _main()
