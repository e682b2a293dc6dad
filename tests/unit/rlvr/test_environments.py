"""Environments: problems by index, and what follows their completions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tensafe_client import BatchError, ConfigError
from tensafe_client.rlvr import (
    ChainSum,
    Problem,
    PromptSet,
    Reply,
    Split,
    Task,
    read_problems,
    rewards,
    same_terms,
)


def test_chained_sums_are_right_and_a_function_of_seed_and_index():
    sums = ChainSum(min_terms=2, max_terms=4, min_digits=1, max_digits=3, seed=5, size=300)
    again = ChainSum(min_terms=2, max_terms=4, min_digits=1, max_digits=3, seed=5, size=999)
    for index in range(300):
        entry = sums[index]
        expression = entry["metadata"]["expression"]
        assert eval(expression) == int(entry["answer"])
        assert entry["question"] == f"Q: {expression} =\nA:"
        assert 2 <= len(expression.split()) // 2 + 1 <= 4
        assert again[index] == entry
    assert len({sums[index]["question"] for index in range(300)}) > 250
    assert [ChainSum(seed=6)[i] for i in range(9)] != [ChainSum(seed=5)[i] for i in range(9)]
    with pytest.raises(IndexError):
        sums[300]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        *(("-2", 1.0), (" -2 ", 1.0), ("-3", 0.2), ("+2", 0.2), ("2.0", 0), ("", 0)),
        ("-" + "2" * 5000, 0.2),
    ],
)
def test_chained_sums_are_scored(answer, score):
    assert ChainSum().score_answer(answer, {"answer": "-2"}) == score


@pytest.mark.parametrize(
    "options",
    [{"min_terms": 1}, {"min_terms": 3}, {"max_digits": 0}, {"size": 0}, {"integer_reward": 1}],
)
def test_a_task_that_cannot_be(options):
    with pytest.raises(ConfigError):
        ChainSum(**options)


def test_a_task_reads_the_first_line_of_a_completion():
    task = Task(ChainSum(size=10))
    problem = task.problem(13)
    assert problem == task.problem(3)
    answer = problem.meta["entry"]["answer"]
    right = task.reply(problem, [f" {answer}\nQ: 1 + 1 ="])
    assert right == Reply({"reward": 1.0, "correct": 1.0})
    assert task.reply(problem, ["no idea"]) == Reply({"reward": 0.0, "correct": 0.0})


def test_the_halves_of_a_task_share_no_sum_in_any_order():
    asked, held_out = (
        Split(ChainSum(seed=seed, size=5000), held_out, same_terms)
        for seed, held_out in ((1, False), (2, True))
    )
    ours, theirs = ([half[index] for index in range(1000)] for half in (asked, held_out))
    assert not {same_terms(entry) for entry in ours} & {same_terms(entry) for entry in theirs}
    # One digit and two terms make 155 sums in all; each half has its share of them.
    assert {len({same_terms(entry) for entry in half}) for half in (ours, theirs)} <= set(
        range(60, 96)
    )
    assert [asked[index] for index in range(1000)] == ours
    assert held_out.score_answer(theirs[0]["answer"], theirs[0]) == 1
    assert len({entry["question"] for entry in ours[:16]}) > 8  # neighbours are not alike
    with pytest.raises(IndexError):
        asked[5000]


def test_a_task_too_small_to_be_split_says_so():
    halves = [Split(ChainSum(size=1), held_out) for held_out in (False, True)]
    found = []
    for half in halves:
        with contextlib.suppress(ConfigError):
            found.append(half[0])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("3 + 4", "4 + 3", True), ("3 - 4", "4 - 3", False), ("1 + 2 - 3", "2 - 3 + 1", True)],
)
def test_sums_with_the_same_terms(one, other, same):
    keys = [same_terms({"metadata": {"expression": text}}) for text in (one, other)]
    assert (keys[0] == keys[1]) == same


def test_reasoning_gym_has_the_same_interface():
    gym = pytest.importorskip(
        "reasoning_gym", reason="needs the extra: uv pip install -c constraints.txt '.[tasks]'"
    )
    task = Task(gym.create_dataset("chain_sum", seed=1, size=20, min_terms=2, max_terms=2))
    problem = task.problem(4)
    assert problem.prompt == problem.meta["entry"]["question"]
    answer = problem.meta["entry"]["answer"]
    assert task.reply(problem, [f" {answer}\n"]) == Reply({"reward": 1.0, "correct": 1.0})
    wrong = task.reply(problem, ["not a number"])
    assert isinstance(wrong.reward, dict)
    assert wrong.reward["reward"] < 1


def test_prompt_sets_begin_anew():
    problems = [Problem("1 + 1 =", {"answer": "2"}), Problem("1 + 2 =", {"answer": "3"})]
    prompts = PromptSet(problems, rewards.ExactMatch())
    assert prompts.problem(5) == problems[1]
    assert prompts.reply(problems[1], ["3"]).reward == 1.0
    for bad in ([], "no function"):
        with pytest.raises(ConfigError):
            PromptSet(bad if bad == [] else problems, rewards.ExactMatch() if bad == [] else bad)  # type: ignore[arg-type]


def test_problems_come_from_jsonl(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    chat = [{"role": "user", "content": "2 + 2?"}]
    path.write_text(
        json.dumps({"prompt": "1 + 1 =", "answer": "2"})
        + "\n\n"
        + json.dumps({"prompt": chat, "answer": "4", "level": 1})
    )
    assert read_problems(path) == [
        Problem("1 + 1 =", {"answer": "2"}),
        Problem(chat, {"answer": "4", "level": 1}),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": [{"role": "user"}]}', '{"prompt": 5}']
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: str):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(BatchError, match="line 2"):
        read_problems(path)
