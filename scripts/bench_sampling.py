"""What the sampler gains over `transformers.generate` called tenant by tenant, in one run.

scripts/bench_sampling.py                   SmolLM2-135M: 4 tenants × 4 prompts × 64 tokens
scripts/bench_sampling.py --clock cpu       CPU seconds, for machines that others use too
scripts/bench_sampling.py --dtype float32   instead of what the device does best
scripts/bench_sampling.py --json FILE       also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from benchmarks import record, sampling
from benchmarks.engine import wall_clock
from transformers import AutoModelForCausalLM

from workers.engine.loading import load_backend, pick_dtype
from workers.engine.model_sources import resolve

MODEL = "smollm2-135m"
GOALS = {"sampler/generate": ">= 2"}
LENGTHS = (16, 24, 40, 56)


def main() -> None:
    """Measures and prints the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tenants", type=int, default=4, help="default 4")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion; default 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0, the likeliest")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; default 3")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; default 1")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    source = resolve(MODEL)
    backend = load_backend([MODEL], device="auto", dtype=arguments.dtype, threads=arguments.threads)
    dtype = pick_dtype(arguments.dtype, backend.device)

    def plain() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype)
        return model.to(backend.device)

    setting = sampling.Setting(
        backend=backend,
        model=MODEL,
        plain=plain,
        vocabulary=49_000,
        rounds=arguments.rounds,
        clock=time.process_time if arguments.clock == "cpu" else wall_clock,
    )
    load = sampling.Load(arguments.tenants, LENGTHS, arguments.tokens, arguments.temperature)
    cells = sampling.measure(setting, load)
    ratios = sampling.ratios(cells)
    print(f"{backend.device}, {torch.get_num_threads()} threads, {dtype}, {arguments.clock} clock")
    for name, value in ratios.items():
        print(f"{name:<52} {value:8.3f}   goal {GOALS.get(name, '')}")
    tokens = load.tenants * len(load.lengths) * load.tokens
    for name, seconds in cells.items():
        print(f"{name:<52} {tokens / sorted(seconds)[len(seconds) // 2]:8.1f} tokens/s")
    if arguments.json is not None:
        record.write(arguments.json, "bench_sampling", ratios, cells)


if __name__ == "__main__":
    main()
