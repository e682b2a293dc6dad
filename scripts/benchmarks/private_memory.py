"""Peak memory of one private step, of the same step without privacy, and of plain `peft`'s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from workers.allocator import suited

_HERE = Path(__file__).resolve().parent
_SIDES = ("private", "engine", "peft")


def measure(model: str, dtype: str, dropout: float, rounds: int) -> dict[str, list[float]]:
    """Bytes by `memory/WHAT/SIDE`, each side and round in a process of its own."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for side in _SIDES:
            arguments = [side, model, dtype, str(dropout)]
            command = [sys.executable, "-m", "benchmarks.private_memory", *arguments]
            environment = dict(os.environ) if side == "peft" else suited(os.environ)
            done = subprocess.run(
                command, cwd=_HERE.parent, env=environment, stdout=subprocess.PIPE, check=True
            )
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(f"memory/{name}/{side}", []).append(value)
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """The private step's median peak over the others'.

    Not the least: one process in five or so, on any side, takes a tenth less than the others, as
    glibc's heap happens to fall."""
    result = {}
    for name, values in found.items():
        _, what, side = name.split("/")
        if side == "private":
            for other in _SIDES[1:]:
                theirs = median(found[f"memory/{what}/{other}"])
                result[f"{what} private/{other}"] = median(values) / theirs
    return result


def _main() -> None:
    from benchmarks.engine import Setting, plain_loop, wall_clock
    from benchmarks.engine_memory import peaks
    from benchmarks.private import BOUND, SIGMA, cells, engine_step
    from tensafe.wire.losses import Reduction
    from workers.engine.loading import load_backend, pick_device, pick_dtype
    from workers.operations import PrivacySettings

    side, model, dtype, dropout = sys.argv[1:]
    steps: dict[str, Any] = {}
    rows = cells(49_000)
    if side == "peft":
        from transformers import AutoModelForCausalLM

        from workers.engine.model_sources import resolve

        device = pick_device("auto")
        base: Any = AutoModelForCausalLM.from_pretrained(
            resolve(model).location, dtype=pick_dtype(dtype, device)
        )
        step = plain_loop(base.to(device), float(dropout), 1)
        steps = {name: lambda own=own: step([own]) for name, own in rows.items()}
    else:
        backend = load_backend([model], device="auto", dtype=dtype, threads=1)
        setting = Setting(backend, model, lambda: None, 49_000, float(dropout), 1, wall_clock)
        run = setting.run_settings()
        if side == "private":
            run = replace(run, privacy=PrivacySettings(SIGMA, BOUND, 8.0))
        backend.open_run("run", run, None)
        for own in rows.values():
            own.ours.reduction = Reduction.SEQUENCE_MEAN
        steps = {
            name: lambda own=own: engine_step(setting, "run", own) for name, own in rows.items()
        }
    print(json.dumps(peaks(steps)))


if __name__ == "__main__":
    _main()
