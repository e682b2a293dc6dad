"""What the engine gains, as ratios to named baselines measured in the same run.

scripts/bench_engine.py                     all parts, SmolLM2-135M
scripts/bench_engine.py --part one          one run against plain transformers + peft
scripts/bench_engine.py --part many         runs in one pass, against in turn and swapping
scripts/bench_engine.py --part memory       peak memory of one run, and what a run more costs
scripts/bench_engine.py --clock cpu         CPU seconds, for machines that others use too
scripts/bench_engine.py --compile first     with compiled kernels
scripts/bench_engine.py --json FILE         also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from benchmarks import engine, engine_memory, engine_products, record
from transformers import AutoModelForCausalLM

from workers.engine.compiling import Compiling
from workers.engine.loading import load_backend, pick_dtype
from workers.engine.model_sources import resolve

MODEL = "smollm2-135m"
GOALS = {
    "one/mixed engine/plain": ">= 3",
    "one/equal engine/plain": ">= 1.5",
    "8x16 together/in_turn": ">= 4",
    "8x64 together/in_turn": ">= 2.5",
    "8x512 together/in_turn": ">= 1",
    "one/mixed peak engine/plain": "<= 0.5",
    "one/equal peak engine/plain": "<= 0.5",
    "memory of a run more / its adapter and optimizer": "<= 1.05",
}


def main() -> None:
    """Measures the asked-for part and prints its ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["one", "many", "memory", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; default 5")
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA; default 0.05")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; default 1")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--compile", choices=["first", "off"], default="off")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    source = resolve(MODEL)
    backend = load_backend(
        [MODEL],
        device="auto",
        dtype=arguments.dtype,
        threads=arguments.threads,
        compiling=Compiling(arguments.compile),
    )

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
    ratios: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    if arguments.part in ("one", "all"):
        raw |= engine.one_run(setting)
    if arguments.part in ("many", "all"):
        raw |= engine.many_runs(setting, 8, [16, 64, 512])
    ratios |= engine.ratios(raw)
    if arguments.part in ("memory", "all"):
        peaks = engine_memory.measure(MODEL, arguments.dtype, arguments.dropout)
        raw |= peaks
        ratios |= engine_memory.ratios(peaks)
    dtype = pick_dtype(arguments.dtype, backend.device)
    rate = engine_products.gigaflops(backend.base_model(MODEL))
    raw["GFLOP/s of products"] = [rate]
    sets = " ".join(record.machine()["instruction_sets"])
    print(
        f"{backend.device} ({sets}), {torch.get_num_threads()} threads, {dtype}, "
        f"products at {rate:.0f} GFLOP/s"
    )
    for name, value in ratios.items():
        print(f"{name:<52} {value:8.3f}   goal {GOALS.get(name, '')}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_engine", ratios, raw)


if __name__ == "__main__":
    main()
