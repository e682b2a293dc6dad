"""RLVR on SmolLM2: what it learns through the service, and how long that takes.

scripts/bench_rlvr.py --part time       the service and a plain loop in turn, same task and recipe
scripts/bench_rlvr.py --part overlap    sampling ahead (max_staleness 1) against waiting (0)
scripts/bench_rlvr.py --part curve      held-out pass rate before and after, over seeds
scripts/bench_rlvr.py --part curve --plot docs/rlvr_curve.svg      also draws it (needs matplotlib)
scripts/bench_rlvr.py --json FILE       also write ratios, raw figures, versions and machine

The task is one-digit sums and differences, after a short supervised warm-up on the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import record
from local_service import LocalService, local_service

from tensafe_client import ServiceClient
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.rlvr import ChainSum, RLVRTrainer, Split, Task, same_terms, warm_up

MODEL = "smollm2-135m"
TRAINING = Task(Split(ChainSum(seed=1, size=100_000), held_out=False, key=same_terms))
HELD_OUT = Task(Split(ChainSum(seed=2, size=100_000), held_out=True, key=same_terms))
# Student's t for a 95% interval, by degrees of freedom.
_T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one training was like."""

    sampled: list[float]
    seconds: list[float]
    warm_up_s: float
    before: float | None = None
    after: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["time", "overlap", "curve"], required=True)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="of the curve; 2 to 10")
    parser.add_argument(
        "--eval-temperature",
        type=float,
        default=1.0,
        help="of the curve's held-out samples; default 1, as in training; 0: greedy",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of time and overlap; default 3")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the curve")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with local_service(backend="torch", models=[MODEL]) as service:
        part = {"time": _time, "overlap": _overlap, "curve": _curve}[arguments.part]
        ratios, raw = part(service, arguments)
    for name, value in ratios.items():
        print(f"{name:<60} {value:8.3f}")
    if arguments.json is not None:
        record.write(arguments.json, f"bench_rlvr {arguments.part}", ratios, raw)


def train(
    service: LocalService,
    iterations: int,
    seed: int,
    *,
    staleness: int = 1,
    eval_temperature: float | None = None,
) -> Trained:
    """Warms a new run up, and trains it by GRPO: 8 problems × 8 rollouts of at most 4 tokens."""
    with ServiceClient(service.target, api_key=service.api_key) as client:
        run = client.create_training_client({"model_ref": MODEL, "seed": seed})
        tokenizer = ChatTokenizer(client.tokenizer_files(MODEL))
        begin = time.perf_counter()
        warm_up(run, TRAINING, tokenizer, steps=8, batch_size=8, learning_rate=1e-3)
        warm_up_s = time.perf_counter() - begin
        config: dict[str, Any] = {
            "iterations": iterations,
            "max_tokens": 4,
            "learning_rate": 2e-4,
            "max_staleness": staleness,
            "seed": seed,
        }
        if eval_temperature is not None:
            config |= {
                "eval_every": iterations,
                "eval_problems": 200,
                "eval_temperature": eval_temperature,
            }
        result = RLVRTrainer(
            run,
            TRAINING,
            config,
            held_out=None if eval_temperature is None else HELD_OUT,
            tokenizer=tokenizer,
        ).run()
        run.delete()
    last = result.reports[-1].held_out
    return Trained(
        [report.pass_rate for report in result.reports],
        [report.seconds for report in result.reports],
        warm_up_s,
        result.first_evaluation.pass_rate if result.first_evaluation else None,
        last.pass_rate if last else None,
    )


def _time(
    service: LocalService, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Service and plain loop in turn, a seed for each round."""
    import torch
    from benchmarks.plain_grpo import Curve, PlainGrpo, Recipe

    from workers.threads import pick_threads

    torch.set_num_threads(pick_threads(1))
    ours, plain = [], []
    ours_s, plain_s, loads = [], [], []
    for seed in range(arguments.rounds):
        begin = time.perf_counter()
        ours.append(train(service, arguments.iterations, seed))
        ours_s.append(time.perf_counter() - begin)
        loads.append(os.getloadavg()[0])
        curve = Curve()
        loop = PlainGrpo(MODEL, TRAINING, Recipe(iterations=arguments.iterations), seed)
        begin = time.perf_counter()
        loop.train(curve)
        plain_s.append(time.perf_counter() - begin)
        plain.append(curve)
        loads.append(os.getloadavg()[0])
        print(
            f"seed {seed}: service {ours_s[-1]:.1f} s, plain loop {plain_s[-1]:.1f} s; loads "
            f"{loads[-2]:.1f} and {loads[-1]:.1f}",
            flush=True,
        )
    ratios = {
        "plain loop / service, wall seconds, all rounds": sum(plain_s) / sum(ours_s),
        "plain loop / service, wall seconds, worst round": min(
            theirs / own for theirs, own in zip(plain_s, ours_s, strict=True)
        ),
        "plain loop / service, median of an iteration": statistics.median(
            second for one in plain for second in one.seconds
        )
        / statistics.median(second for one in ours for second in one.seconds),
    }
    for side, found in (("service", ours), ("plain loop", plain)):
        for name, value in _in_fives([one.sampled for one in found]).items():
            ratios[f"{side}, {name}"] = value
    return ratios, {
        "service": [dataclasses.asdict(one) for one in ours],
        "plain": [dataclasses.asdict(one) for one in plain],
        "service_s": ours_s,
        "plain_s": plain_s,
        "load_averages": loads,
    }


def _overlap(
    service: LocalService, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Waiting and sampling ahead in turn."""
    medians: dict[int, list[float]] = {0: [], 1: []}
    loads = []
    for _ in range(arguments.rounds):
        for staleness in (0, 1):
            found = train(service, arguments.iterations, seed=0, staleness=staleness)
            medians[staleness].append(statistics.median(found.seconds))
            loads.append(os.getloadavg()[0])
    pairs = [waits / ahead for waits, ahead in zip(medians[0], medians[1], strict=True)]
    return {
        "waiting / sampling ahead, median of an iteration, best rounds": min(medians[0])
        / min(medians[1]),
        "waiting / sampling ahead, median of an iteration, median of pairs": statistics.median(
            pairs
        ),
    }, {
        "seconds": {str(key): value for key, value in medians.items()},
        "load_averages": loads,
    }


def _curve(
    service: LocalService, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    if not 2 <= arguments.seeds <= 10:
        raise SystemExit("--seeds must be from 2 to 10: one has no interval")
    found = []
    for seed in range(arguments.seeds):
        found.append(
            train(
                service,
                arguments.iterations,
                seed,
                eval_temperature=arguments.eval_temperature,
            )
        )
        print(f"seed {seed}: held-out {found[-1].before:.3f} -> {found[-1].after:.3f}", flush=True)
    gains = [
        one.after - one.before for one in found if one.after is not None and one.before is not None
    ]
    half = _T_95[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.fmean(gains)
    if arguments.plot is not None:
        _plot(arguments.plot, found)
    return {
        "gain of the held-out pass rate, mean over seeds": mean,
        "lower end of its 95% interval": mean - half,
        "upper end of its 95% interval": mean + half,
        **_in_fives([one.sampled for one in found]),
    }, {"runs": [dataclasses.asdict(one) for one in found]}


def _in_fives(curves: list[list[float]]) -> dict[str, float]:
    """Means over curves and five iterations at a time."""
    return {
        f"sampled accuracy, iterations {i + 1} to {i + 5}": statistics.fmean(
            value for curve in curves for value in curve[i : i + 5]
        )
        for i in range(0, len(curves[0]), 5)
    }


def _plot(path: Path, found: list[Trained]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tensafe"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for seed, one in enumerate(found):
        axes.plot(range(1, len(one.sampled) + 1), one.sampled, alpha=0.35, label=f"seed {seed}")
    mean = [
        statistics.fmean(values) for values in zip(*(one.sampled for one in found), strict=True)
    ]
    axes.plot(range(1, len(mean) + 1), mean, color="black", linewidth=2, label="mean")
    axes.set(xlabel="iteration", ylabel="sampled pass rate", ylim=(0, 1))
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
