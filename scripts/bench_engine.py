"""What the engine gains, as ratios to named baselines measured in the same run.

scripts/bench_engine.py                     four parts: SmolLM2-135M on a CPU, random-1b on a GPU
scripts/bench_engine.py --model random-1b   1.24 B parameters at random, as Llama 3.2 1B
scripts/bench_engine.py --model random-135m as SmolLM2-135M, on machines that do not have it
scripts/bench_engine.py --part one          one run against plain transformers + peft
scripts/bench_engine.py --part many         runs in one pass, against in turn and swapping
scripts/bench_engine.py --part segments     ways to compute the adapters of several runs
scripts/bench_engine.py --part memory       peak memory of one run, and what a run more costs
scripts/bench_engine.py --part profile      where the time of a step goes, by file
scripts/bench_engine.py --part threads      what a CPU's threads are used for (--threads 2 or more)
scripts/bench_engine.py --clock cpu         CPU seconds, for machines that others use too
scripts/bench_engine.py --compile first     with compiled kernels, as on a GPU by itself
scripts/bench_engine.py --cuda-graphs off   a GPU's passes as written
scripts/bench_engine.py --json FILE         also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from benchmarks import (
    engine,
    engine_memory,
    engine_products,
    engine_profile,
    engine_segments,
    engine_threads,
    record,
)
from benchmarks.models import NAMES, SMOLLM2, Choice

from workers.engine.loading import pick_device

SMALL = (SMOLLM2, "random-135m")
MANY = {"small": [(8, [16, 64, 512])], "large": [(8, [16, 64, 512]), (32, [256])]}
"""Runs, and their tokens each, of a model that a CPU trains and of others."""
GOALS = {
    "one/mixed engine/plain": ">= 3",
    "one/equal engine/plain": ">= 1.5",
    "8x16 together/in_turn": ">= 4",
    "8x64 together/in_turn": ">= 2.5",
    "8x512 together/in_turn": ">= 1",
    "32x256 together/swapping": ">= 4",
    "one/mixed peak engine/plain": "<= 0.5",
    "one/equal peak engine/plain": "<= 0.5",
    "memory of a run more / its adapter and optimizer": "<= 1.05",
}
GPU_GOALS = {"one/mixed engine/plain": ">= 2", "one/equal engine/plain": ""}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the asked-for part and prints its ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part",
        choices=["one", "many", "segments", "memory", "profile", "threads", "all"],
        default="all",
        help="all: the first four",
    )
    parser.add_argument("--model", choices=["auto", *NAMES], default="auto")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="interleaved rounds; default 5; of memory at most 3, of segments always 21, of the "
        "profile 3",
    )
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA; default 0.05")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; default 1")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="of one, many and threads"
    )
    parser.add_argument("--compile", choices=["auto", "first", "off"], default="auto")
    parser.add_argument("--cuda-graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)

    device = pick_device("auto")
    on_gpu = device != "cpu"
    model = arguments.model
    if model == "auto":
        model = "random-1b" if on_gpu else SMOLLM2
    if on_gpu and arguments.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does; leave it out")
    if arguments.part == "threads" and (on_gpu or arguments.threads < 2):
        parser.error(
            "--part threads compares a CPU's threads; give --threads 2 or more, and no GPU"
        )
    if arguments.part == "profile" and arguments.threads > 1:
        parser.error("--part profile looks into one thread; leave --threads out")
    as_written = arguments.cuda_graphs == arguments.compile == "off"
    if arguments.part == "profile" and on_gpu and not as_written:
        parser.error("--part profile sees passes as written: add --cuda-graphs off --compile off")
    choice = Choice(
        model, arguments.dtype, arguments.threads, arguments.compile, arguments.cuda_graphs
    )
    setting = engine.Setting(
        backend=choice.backend(),
        model=model,
        plain=choice.plain,
        vocabulary=choice.vocabulary,
        dropout=arguments.dropout,
        rounds=arguments.rounds,
        clock=time.process_time if arguments.clock == "cpu" else engine.wall_clock,
    )
    raw, ratios, rate = _measure(setting, choice, arguments)
    raw["GFLOP/s of products"] = [rate]
    sets = " ".join(record.machine()["instruction_sets"])
    print(
        f"{model} on {device} ({sets}), {torch.get_num_threads()} threads, {choice.torch_dtype}, "
        f"products at {rate:.0f} GFLOP/s"
    )
    goals = GOALS | (GPU_GOALS if on_gpu else {})
    width = max(map(len, ratios), default=0)
    for name, value in ratios.items():
        goal = f"   goal {goals[name]}" if goals.get(name) else ""
        print(f"{name:<{width}} {value:8.3f}{goal}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_engine", ratios, raw)


def _measure(
    setting: engine.Setting, choice: Choice, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, float], float]:
    """Raw figures, ratios, and the rate of products in GFLOP/s."""
    part, model = arguments.part, setting.model
    base = setting.backend.base_model(model)
    raw: dict[str, Any] = {}
    work: dict[str, float] = {}
    if part in ("one", "all"):
        raw |= engine.one_run(setting)
        work |= engine.one_work(setting)
    if part in ("many", "all"):
        for tenants, lengths in MANY[
            "small" if model in SMALL and base.device == "cpu" else "large"
        ]:
            raw |= engine.many_runs(setting, tenants, lengths)
            work |= engine.many_work(setting, tenants, lengths)
    rate = engine_products.gigaflops(base, setting.clock)
    ratios = engine.ratios(raw) | engine.utilisation(raw, work, rate)
    found: dict[str, list[float]]
    if part in ("segments", "all"):
        raw |= (found := engine_segments.measure(base))
        ratios |= engine_segments.ratios(found)
    if part in ("memory", "all"):
        found = engine_memory.measure(choice, arguments.dropout, arguments.rounds)
        raw |= found
        ratios |= engine_memory.ratios(found)
    if part == "profile":
        raw |= (found := engine_profile.measure(setting))
        ratios |= engine_profile.ratios(found)
    if part == "threads":
        raw |= (found := engine_threads.measure(setting))
        ratios |= engine_threads.ratios(found)
    return raw, ratios, rate


if __name__ == "__main__":
    main()
