"""An iteration's numbers, of those of its calls."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tensafe.v1 import operations_pb2, types_pb2
from tensafe_client import ForwardBackwardResult
from tensafe_client.results import result_of
from tensafe_client.rlvr import Problem
from tensafe_client.rlvr.report import last_loss, loss_metrics, rewarded
from tensafe_client.rlvr.rollouts import Rollout
from tensafe_client.rlvr.scoring import Failure

HOW = {
    "loss": "sum",
    "scored_tokens": "sum",
    "ratio_max": "max",
    "ratio_min": "min",
    "clip_fraction": "mean",
    "clipped": "sum",
}


def call(loss: float, scored: float, **metrics: float) -> ForwardBackwardResult:
    every = {"loss": loss, "scored_tokens": scored, **metrics}
    return ForwardBackwardResult(loss, 9, every, {}, 1.0, reductions=HOW)


FIRST = call(1.0, 10, ratio_max=1.5, ratio_min=0.5, clip_fraction=0.2, clipped=2)
SECOND = call(-3.0, 30, ratio_max=1.1, ratio_min=0.9, clip_fraction=0.4, clipped=12)


@pytest.mark.parametrize("calls", [[FIRST, SECOND], [SECOND, FIRST]])
def test_metrics_are_combined_as_their_loss_declares(calls):
    assert loss_metrics(calls) == {
        "ratio_max": 1.5,
        "ratio_min": 0.5,
        "clip_fraction": pytest.approx(0.35),
        "clipped": 14,
    }
    assert loss_metrics([]) == {}


def test_cutting_an_update_into_calls_changes_no_number():
    rng = np.random.default_rng(0)
    ratios = rng.uniform(0.5, 1.5, 12)

    def part(values: np.ndarray) -> ForwardBackwardResult:
        return call(
            float(values.sum()),
            len(values),
            ratio_max=float(values.max()),
            ratio_min=float(values.min()),
            clip_fraction=float((values > 1.2).mean()),
            clipped=float((values > 1.2).sum()),
        )

    whole, cut = [part(ratios)], [part(ratios[:3]), part(ratios[3:])]
    assert loss_metrics(cut) == pytest.approx(loss_metrics(whole))
    assert last_loss([cut]) == pytest.approx(last_loss([whole]))


def test_the_loss_is_that_of_all_calls_of_the_last_update():
    assert last_loss([[SECOND], [FIRST, SECOND]]) == -2.0
    assert math.isnan(last_loss([]))


def test_results_say_how_their_metrics_combine():
    operation = operations_pb2.Operation()
    for name, how in (("ratio_max", types_pb2.REDUCTION_MAX), ("kl", types_pb2.REDUCTION_MEAN)):
        operation.result.forward_backward.metrics.add(name=name, value=1.0, reduction=how)
    assert result_of(operation, None).reductions == {"ratio_max": "max", "kl": "mean"}


def test_a_problem_is_solved_where_its_environment_says_so_or_by_the_reward():
    def scored(reward: float, **parts: float) -> Rollout:
        rollout = Rollout(Problem("p"), 0, [1])
        rollout.score({"reward": reward, **parts})
        return rollout

    failed = scored(5.0)
    failed.failure = Failure("error", "no verdict")
    every = [scored(0.9), scored(1.0), scored(1.2, correct=0), scored(0.0, correct=1), failed]
    found = rewarded(every, pass_reward=1.0)
    assert found.pass_rate == 2 / 5
    assert (found.least, found.most) == (0.0, 1.2)
    assert found.parts == {"correct": 0.5}
    assert rewarded(every, pass_reward=0.5).pass_rate == 3 / 5
