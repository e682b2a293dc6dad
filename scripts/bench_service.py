"""What the service costs, as ratios to named baselines measured in the same run.

scripts/bench_service.py                      all parts
scripts/bench_service.py --part latency       an operation on the mock backend against a bare echo
scripts/bench_service.py --part training      SFT on SmolLM2 through the service against local loops
scripts/bench_service.py --part company       eight clients that train at once against one
scripts/bench_service.py --json FILE          also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import latency, record

GOALS = {
    "operation_p50/echo_p50": "<= 6",
    "one_rpc_each/echo_rate": ">= 0.3",
    "futures/echo_rate": ">= 1.0",
    "service/engine_loop": ">= 0.97",
    "service/plain_loop": ">= 1.0",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["latency", "training", "company", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; default 5")
    parser.add_argument("--operations", type=int, default=2000, help="operations in a round")
    parser.add_argument("--steps", type=int, default=3, help="training steps in a round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    ratios: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    if arguments.part in ("latency", "all"):
        cells = latency.measure(arguments.rounds, arguments.operations)
        ratios |= latency.ratios(cells)
        raw |= cells
    if arguments.part in ("training", "all"):
        from benchmarks import training

        cells = training.measure(arguments.rounds, arguments.steps)
        ratios |= training.ratios(cells)
        raw |= cells
    if arguments.part in ("company", "all"):
        from benchmarks import company

        cells = company.measure(arguments.rounds, arguments.steps)
        ratios |= company.ratios(cells)
        raw |= cells
    for name, value in ratios.items():
        goal = next((goal for key, goal in GOALS.items() if name.endswith(key)), "")
        print(f"{name:<40} {value:8.3f}   goal {goal}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_service", ratios, raw)


if __name__ == "__main__":
    main()
