"""The loop against a run that only writes down what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_run import Done, Run
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_client.rlvr import IterationReport, Problem, RewardsFailedError, learning
from tensafe_client.rlvr.collecting import CollectedBatch
from tensafe_client.rlvr.config import RLVRConfig
from tensafe_client.rlvr.loop import RLVRResult, TrainingLoop
from tensafe_client.rlvr.rollouts import Rollout
from tensafe_client.rlvr.scoring import Failure
from tensafe_client.rlvr.state import TrainerState


@dataclass
class FirstTurn(Done):
    """Writes down that it was given up."""

    log: list[str] = field(default_factory=list)

    def cancel(self) -> bool:
        self.log.append(f"drop {self.value}")
        return True


@dataclass
class Begun:
    first: int
    sampled_at: int
    first_turn: FirstTurn


@dataclass
class Collector:
    """Rollouts with the rewards that `rewards(problem)` names, None for one that failed."""

    run: Run
    rewards: Callable[[int], Sequence[float | None]]
    prompts: int = 2
    problems: list[int] = field(default_factory=list)
    stalenesses: list[int] = field(default_factory=list)
    iteration: Callable[[], int] = lambda: 0

    def begin(self, problems: range, samples: int, *, sampled_at: int, seed: int) -> Begun:
        number = problems.start // len(problems)
        self.run.log.append(f"sample {number}")
        return Begun(problems.start, sampled_at, FirstTurn(number, self.run.log))

    def finish(self, begun: Begun) -> CollectedBatch:
        rollouts = []
        self.stalenesses.append(self.iteration() - begun.sampled_at)
        for group in range(self.prompts):
            index = begun.first + group
            self.problems.append(index)
            for reward in self.rewards(index):
                # The first token tells the problem.
                rollout = Rollout(Problem(str(index)), group, [index, 1])
                rollout.tokens += [2, 3]
                rollout.written += [True, True]
                rollout.logprobs += [-0.5, -0.25 * (1 + index)]
                if reward is None:
                    rollout.failure = Failure("error", "no verdict")
                else:
                    rollout.score(reward)
                rollouts.append(rollout)
        return CollectedBatch(begun.sampled_at, rollouts)


def mixed(problem: int) -> list[float | None]:
    return [0.0, 1.0]


def trained(
    rewards: Callable[[int], Sequence[float | None]] = mixed,
    stop: threading.Event | None = None,
    saved: dict[str, Any] | None = None,
    on_report: Callable[[IterationReport], None] = lambda _: None,
    run: Run | None = None,
    **config: Any,
) -> tuple[Run, Collector, RLVRResult]:
    """A whole training, or the rest of one that was saved."""
    asked = RLVRConfig(**{"prompts": 2, "group_size": 2, "iterations": 3, **config})
    run, state = run or Run(), TrainerState.fresh(asked)
    if saved is not None:
        state = TrainerState.from_metadata(saved, asked)
    collector = Collector(run, rewards, asked.prompts, iteration=lambda: state.iteration)
    loop = TrainingLoop(
        run,  # type: ignore[arg-type]
        asked,
        state,
        stop or threading.Event(),
        collector,  # type: ignore[arg-type]
        None,
        on_report,
        lambda *_: None,
    )
    return run, collector, loop.run()


def learned_problems(run: Run) -> list[list[int]]:
    return [sorted({int(datum.tokens[0]) for datum in update}) for update in run.learned]


def test_the_next_batch_is_sampled_before_the_update_or_behind_it():
    ahead, _, _ = trained(max_staleness=1)
    assert ahead.log == [
        *("sample 0", "sample 1", "update 1", "sample 2", "update 2", "update 3", "save"),
    ]
    waits, _, _ = trained(max_staleness=0)
    assert waits.log == [
        *("sample 0", "update 1", "sample 1", "update 2", "sample 2", "update 3", "save"),
    ]


def test_nothing_is_sampled_across_a_checkpoint():
    run, _, _ = trained(max_staleness=2, checkpoint_every=2, iterations=5)
    assert run.log == [
        *("sample 0", "sample 1", "update 1", "update 2", "save"),
        *("sample 2", "sample 3", "update 3", "update 4", "save"),
        *("sample 4", "update 5", "save"),
    ]


def test_problems_that_compare_nothing_are_filtered_and_replaced():
    def rewards(problem: int) -> list[float | None]:
        return [0.0, 1.0] if problem % 3 == 0 else [1.0, 1.0]

    run, _, result = trained(rewards, max_batches=9, max_staleness=0, iterations=2)
    assert learned_problems(run) == [[0, 3], [6, 9]]
    assert [report.equal_problems for report in result.reports] == [2, 4]
    assert [report.problems for report in result.reports] == [2, 2]
    bounded, _, result = trained(rewards, max_batches=1, max_staleness=0, iterations=2)
    assert learned_problems(bounded) == [[0], [3]]
    kept, _, _ = trained(rewards, filter_equal_groups=False, max_staleness=0, iterations=2)
    assert learned_problems(kept) == [[0, 1], [2, 3]]


def test_an_iteration_without_anything_to_learn_makes_no_update():
    run, _, result = trained(lambda _: [1.0, 1.0], iterations=2)
    assert run.learned == []
    assert [report.equal_problems for report in result.reports] == [2, 2]
    assert [np.isnan(report.grad_norm) for report in result.reports] == [True, True]


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
@pytest.mark.parametrize("baseline", ["batch_mean", "moving_average", "none"])
def test_a_group_of_one_is_learned_from_where_nothing_is_compared_within_it(algorithm, baseline):
    run, _, result = trained(
        lambda problem: [1.0 + problem % 2],
        algorithm=algorithm,
        baseline=baseline,
        group_size=1,
        iterations=2,
    )
    assert learned_problems(run) == [[0, 1], [2, 3]]
    assert all(datum.inputs["advantages"].any() for update in run.learned for datum in update)
    assert [report.equal_problems for report in result.reports] == [0, 0]
    assert [report.updates for report in result.reports] == [1, 1]


def test_only_problems_at_the_baseline_itself_are_dropped_where_it_is_the_batchs():
    """Rewards 0, 1 and ½ on average: the problem at ½ teaches nothing, the equal others do."""
    rewards = {0: [0.0, 0.0], 1: [1.0, 1.0], 2: [0.5, 0.5]}
    run, _, result = trained(
        lambda problem: rewards[problem % 3], algorithm="reinforce", prompts=3, iterations=1
    )
    assert learned_problems(run) == [[0, 1]]
    found = {int(one.tokens[0]): one.inputs["advantages"][-1] for one in run.learned[0]}
    assert found == {0: -0.5, 1: 0.5}
    assert (result.reports[0].problems, result.reports[0].equal_problems) == (2, 1)
    # Batches that join the first are judged with it: by themselves, both would teach nothing.
    run, _, result = trained(
        lambda problem: [float(problem < 2)] * 2,
        algorithm="reinforce",
        max_batches=2,
        max_staleness=0,
        iterations=1,
    )
    assert learned_problems(run) == [[0, 1, 2, 3]]


def test_the_average_takes_in_what_is_dropped_too():
    run, _, result = trained(
        lambda problem: [1.0, 1.0] if problem < 2 else [3.0, 3.0],
        algorithm="reinforce",
        baseline="moving_average",
        iterations=2,
    )
    assert [report.updates for report in result.reports] == [0, 1]
    assert {float(one.inputs["advantages"][-1]) for one in run.learned[0]} == {2.0}


def test_the_average_takes_each_batch_in_once_however_many_join_it():
    run, _, _ = trained(
        lambda _: [1.0, 1.0],
        algorithm="reinforce",
        baseline="moving_average",
        max_batches=3,
        iterations=1,
    )
    average = run.metadata["rlvr"]["average"]
    assert average["weight"] == average["total"] == pytest.approx(0.1)


@settings(deadline=None, max_examples=60)
@given(
    most=st.integers(0, 3),
    batches=st.integers(1, 3),
    every=st.integers(0, 4),
    equal=st.sets(st.integers(0, 40)),
)
def test_no_rollout_is_older_than_the_bound_and_none_is_lost(most, batches, every, equal):
    run, collector, result = trained(
        lambda problem: [1.0, 1.0] if problem in equal else [0.0, 1.0],
        iterations=6,
        max_staleness=most,
        max_batches=batches,
        checkpoint_every=every,
    )
    assert max(collector.stalenesses) <= most
    assert sum(report.stale_rollouts for report in result.reports) == 0
    assert collector.problems == list(range(len(collector.problems)))
    learned = [problem for update in learned_problems(run) for problem in update]
    assert learned == [problem for problem in collector.problems if problem not in equal]


def test_every_epoch_and_minibatch_is_an_update_by_the_numbers_that_were_sampled():
    run, _, _ = trained(
        lambda _: [0.0, 1.0, 0.5, 0.0], group_size=4, inner_epochs=3, minibatches=2, iterations=1
    )
    assert len(run.learned) == 6
    assert [len(update) for update in run.learned] == [4] * 6
    for epoch in range(3):
        both = run.learned[2 * epoch] + run.learned[2 * epoch + 1]
        assert sorted(int(datum.tokens[0]) for datum in both) == [0] * 4 + [1] * 4
        for datum in both:
            # Prompt, then two tokens of the policy: q stays what it was, epoch by epoch.
            expected = [0.0, -0.5, -0.25 * (1 + datum.tokens[0])]
            np.testing.assert_allclose(datum.inputs["logprobs"], expected)
            assert (datum.weights != 0).tolist() == [False, True, True]
    orders = [[int(datum.tokens[0]) for datum in update] for update in run.learned]
    assert orders[0:2] != orders[2:4]


def test_an_update_of_several_calls_reports_as_of_one(monkeypatch):
    rewards = [0.0, 1.0, 0.5, 0.0]
    monkeypatch.setattr(learning, "_TOKENS_PER_CALL", 10)
    _, _, result = trained(
        lambda _: rewards, group_size=4, inner_epochs=2, minibatches=2, iterations=1
    )
    assert result.reports[0].updates == 4
    assert result.reports[0].loss == 4  # datums of the last one, in two calls


def test_failed_rewards_are_counted_left_out_and_bounded():
    run, _, result = trained(
        lambda problem: [0.0, 1.0, None], group_size=3, iterations=1, max_failed_rewards=0.4
    )
    assert result.reports[0].failed_rewards == {"error": 2}
    assert [len(update) for update in run.learned] == [4]
    with pytest.raises(RewardsFailedError, match="2 of 6 rewards failed; the first: error: no ve"):
        trained(
            lambda problem: [0.0, 1.0, None], group_size=3, iterations=1, max_failed_rewards=0.3
        )


def test_what_was_learned_before_rewards_failed_is_told_and_nothing_goes_on():
    told: list[int] = []
    run = Run()
    with pytest.raises(RewardsFailedError) as caught:
        trained(
            lambda problem: [0.0, 1.0] if problem < 4 else [None, None],
            on_report=lambda report: told.append(report.iteration),
            run=run,
            iterations=9,
            max_staleness=3,
        )
    assert told == [1, 2]
    assert caught.value.metadata["run_id"] == "run-1"
    assert run.log == [
        *("sample 0", "sample 1", "sample 2", "sample 3", "update 1"),
        *("sample 4", "update 2", "drop 4", "drop 3"),
    ]


def test_a_stop_gives_back_what_was_sampled_ahead():
    stop = threading.Event()
    run, _, result = trained(stop=stop, on_report=lambda _: stop.set(), iterations=9)
    assert result.stopped
    assert run.log[-1] == "save"
    assert result.artifact_id == f"art-{run.step}"
    assert len(result.reports) == run.step < 9
    assert run.metadata["rlvr"]["next_batch"] == run.step


def numbers(run: Run) -> list[list[tuple[Any, ...]]]:
    return [
        [(*datum.tokens, *datum.inputs["advantages"], *datum.weights) for datum in update]
        for update in run.learned
    ]


@pytest.mark.parametrize("baseline", ["moving_average", "batch_mean"])
@pytest.mark.parametrize("exact", [{"checkpoint_every": 2}, {"max_staleness": 0}])
def test_what_a_checkpoint_remembers_is_all_that_the_rest_depends_on(baseline: str, exact: Any):
    def rewards(problem: int) -> list[float | None]:
        return [problem / 7, 1.0 - problem % 3]

    config = {"algorithm": "reinforce", "baseline": baseline, **exact}
    whole, sampled, _ = trained(rewards, iterations=6, **config)
    begun, before, _ = trained(rewards, iterations=4, **config)
    rest, after, result = trained(rewards, iterations=6, saved=begun.metadata, **config)
    assert [report.iteration for report in result.reports] == [5, 6]
    assert numbers(begun) + numbers(rest) == numbers(whole)
    assert before.stalenesses + after.stalenesses == sampled.stalenesses
    assert rest.metadata["rlvr"]["average"] == whole.metadata["rlvr"]["average"]


def test_elsewhere_the_problems_are_the_same_and_their_completions_are_drawn_anew():
    _, sampled, _ = trained(iterations=6)
    begun, before, _ = trained(iterations=4)
    _, after, _ = trained(iterations=6, saved=begun.metadata)
    assert before.problems + after.problems == sampled.problems
    assert (before.stalenesses, after.stalenesses) == ([0, 1, 1, 1], [0, 1])
    assert sampled.stalenesses == [0, 1, 1, 1, 1, 1]
