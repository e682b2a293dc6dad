"""What durability costs, and how long a crash is noticed.

scripts/bench_recovery.py                      all three parts
scripts/bench_recovery.py --part steady        SFT on SmolLM2, with log and snapshots and without
scripts/bench_recovery.py --part worker        from a worker's SIGKILL to the next resolved future
scripts/bench_recovery.py --part coordinator   from a coordinator's start to its first answer
scripts/bench_recovery.py --json FILE          also write ratios, raw figures, versions and machine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import record, recovery

GOALS = {
    "steady": ">= 0.97",
    "worker": "<= 2",
    "coordinator finished": "<= 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["steady", "worker", "coordinator", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each part; default 4")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a round")
    parser.add_argument("--runs", type=int, default=100, help="runs in the store")
    parser.add_argument("--operations", type=int, default=10_000, help="operations in the store")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    cells: dict[str, list[float]] = {}
    if arguments.part in ("coordinator", "all"):
        cells |= recovery.coordinator_restart(
            arguments.rounds, arguments.runs, arguments.operations
        )
    if arguments.part in ("worker", "all"):
        cells |= recovery.worker_death(arguments.rounds, arguments.steps)
    if arguments.part in ("steady", "all"):
        cells |= recovery.steady_state(arguments.rounds, arguments.steps)
    ratios = recovery.ratios(cells)
    for name, value in ratios.items():
        goal = next((goal for key, goal in GOALS.items() if name.startswith(key)), "")
        print(f"{name:<68} {value:8.3f}   {'goal ' + goal if goal else ''}")
    if arguments.json is not None:
        record.write(arguments.json, "bench_recovery", ratios, cells)


if __name__ == "__main__":
    main()
