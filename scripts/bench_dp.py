"""What privacy costs, as ratios to named baselines measured in the same run.

scripts/bench_dp.py                     time and memory, SmolLM2-135M
scripts/bench_dp.py --part time         a private step against the same step without privacy, plain
                                        transformers + peft, and Opacus 1.6 with ghost clipping if
                                        it is installed (pip install --no-deps opacus opt-einsum)
scripts/bench_dp.py --part time --cell mixed --rounds 21    one kind of rows alone, for longer
scripts/bench_dp.py --part memory       peak memory of the process, each side in one of its own
scripts/bench_dp.py --part curve        held-out loss of a training through the service, with
                                        privacy and without, on the standard library's docstrings
scripts/bench_dp.py --part curve --plot docs/privacy_curve.svg    draws it (needs matplotlib)
scripts/bench_dp.py --clock wall        wall time instead of CPU time
scripts/bench_dp.py --json FILE         also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from benchmarks import engine, private, private_curve, private_memory, record
from transformers import AutoModelForCausalLM

from workers.engine.loading import load_backend, pick_dtype
from workers.engine.model_sources import resolve

MODEL = "smollm2-135m"
GOAL = "<= 1.05"


def main() -> None:
    """Measures the asked-for part and prints its ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["time", "memory", "curve", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; default 7")
    parser.add_argument(
        "--cell", choices=[*private.CELLS, "all"], default="all", help="of the time"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA; default 0")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; default 1")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--steps", type=int, default=40, help="of the curve; default 40")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the curve")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.part == "curve":
        _curve(arguments)
        return
    ratios: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    if arguments.part in ("time", "all"):
        raw |= _times(arguments)
        ratios |= private.ratios(raw)
    if arguments.part in ("memory", "all"):
        peaks = private_memory.measure(MODEL, arguments.dtype, arguments.dropout, arguments.rounds)
        raw |= peaks
        ratios |= private_memory.ratios(peaks)
    for name, value in ratios.items():
        goal = "" if "opacus" in name or "above model" in name else GOAL
        print(f"{name:<40} {value:8.3f}   goal {goal}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_dp", ratios, raw)


def _curve(arguments: argparse.Namespace) -> None:
    recipe = private_curve.Recipe(MODEL, steps=arguments.steps)
    compared = private_curve.train(recipe, lambda text: print(text, flush=True))
    ratios = private_curve.ratios(compared)
    for name, value in ratios.items():
        print(f"{name:<60} {value:8.3f}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_dp curve", ratios, dataclasses.asdict(compared))
    if arguments.plot is not None:
        private_curve.plot(arguments.plot, compared, recipe)


def _times(arguments: argparse.Namespace) -> dict[str, list[float]]:
    source = resolve(MODEL)
    backend = load_backend([MODEL], device="auto", dtype=arguments.dtype, threads=arguments.threads)

    def plain() -> Any:
        dtype = pick_dtype(arguments.dtype, backend.device)
        model: Any = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype)
        return model.to(backend.device)

    setting = engine.Setting(
        backend=backend,
        model=MODEL,
        plain=plain,
        vocabulary=49_000,
        dropout=arguments.dropout,
        rounds=arguments.rounds,
        clock=time.process_time if arguments.clock == "cpu" else engine.wall_clock,
    )
    if find_spec("opacus") is None:
        print("opacus is not installed: nothing is compared with it")
    ghost = plain() if find_spec("opacus") else None
    print(f"{backend.device}, {torch.get_num_threads()} threads, {backend.models()[0].dtype}")
    names = private.CELLS if arguments.cell == "all" else [arguments.cell]
    return private.measure(setting, ghost, names)


if __name__ == "__main__":
    main()
