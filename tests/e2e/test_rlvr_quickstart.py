"""Every sample of docs/rlvr_quickstart.md is executed, and the command line trains and resumes."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from harness.command_line import run_tensafe, start_tensafe
from local_service import LocalService

PAGE = (Path(__file__).parents[2] / "docs/rlvr_quickstart.md").read_text()
SAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
(COMMAND,) = re.findall(r"^tensafe (train rlvr .*)$", PAGE, re.M)


def test_the_samples_run_as_written(
    tiny_service: LocalService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On the tiny model in the place of the real one, in one namespace from top to bottom."""
    monkeypatch.setenv("TENSAFE_TARGET", tiny_service.target)
    monkeypatch.setenv("TENSAFE_API_KEY", tiny_service.api_key)
    assert len(SAMPLES) == 3
    names: dict[str, Any] = {}
    for sample in SAMPLES:
        exec(compile(sample.replace("smollm2-135m", "tiny"), "sample", "exec"), names)
    assert names["report"].parts["turns"] > 1, "no episode had a second turn"
    printed = capsys.readouterr().out
    assert "20: reward" in printed
    assert "art-" in printed


def rlvr(service: LocalService, *arguments: str) -> list[dict[str, Any]]:
    ran = run_tensafe(service, "train", "rlvr", *arguments, "--json")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_the_command_of_the_page_trains(tiny_service: LocalService):
    arguments = shlex.split(COMMAND.replace("smollm2-135m", "tiny"))[2:]
    arguments[arguments.index("--iterations") + 1] = "4"
    events = rlvr(tiny_service, *arguments, "--eval-problems", "8")
    kinds = [event["event"] for event in events]
    assert kinds.count("iteration") == 4
    assert kinds.count("eval") == 2
    assert kinds[0] == "warm_up"
    assert kinds[-1] == "saved"
    assert len(events[0]["losses"]) == 8


def test_a_file_of_problems(tiny_service: LocalService, tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    short = ["--prompts", "2", "--group-size", "4", "--max-tokens", "2", "--iterations", "2"]
    options = ["--reward", "keywords", "--reward-options", '{"keywords": ["x"]}']
    events = rlvr(tiny_service, str(path), "--model", "tiny", *options, *short)
    assert [event["event"] for event in events] == ["iteration", "iteration", "saved"]


def test_a_task_of_reasoning_gym(tiny_service: LocalService):
    pytest.importorskip(
        "reasoning_gym", reason="needs the extra: uv pip install -c constraints.txt '.[tasks]'"
    )
    short = ["--prompts", "2", "--group-size", "2", "--max-tokens", "2", "--iterations", "1"]
    events = rlvr(tiny_service, "gym:basic_arithmetic", "--model", "tiny", *short)
    assert [event["event"] for event in events] == ["iteration", "saved"]
    assert events[0]["failed_rewards"] == {}
    unknown = ["train", "rlvr", "gym:no_such_task", "--model", "tiny"]
    assert "'no_such_task'" in run_tensafe(tiny_service, *unknown, expect=6).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-task", "--model", "tiny"], "none of chain-sum"),
        (["chain-sum"], "--model"),
        (["chain-sum", "--model", "tiny", "--reward", "regex"], "judges and holds out by itself"),
        (["chain-sum", "--model", "tiny", "--set", "clip"], "NAME=VALUE"),
        (["chain-sum", "--model", "tiny", "--set", "clip_lo=0.5"], "clip_low"),
        (["chain-sum", "--model", "tiny", "--algorithm", "rloo", "--set", "clip_low=0.5"], "rloo"),
        (["chain-sum", "--model", "tiny", "--set", "eval_every=1"], "give --eval-every"),
        (["chain-sum", "--model", "tiny", "--set", "learning_rate=1"], "give --lr"),
        (["chain-sum", "--model", "tiny", "--set", "seed=1"], "give --seed"),
        (["chain-sum", "--model", "tiny", *2 * ["--set", "top_k=5"]], "given twice"),
        (["chain-sum", "--model", "tiny", "--warm-up-lr", "1"], "without --warm-up"),
        (["chain-sum", "--model", "tiny", "--eval-problems", "9"], "without --eval-every"),
        (
            [__file__, "--model", "tiny", "--reward", "exact_match", "--eval-data", __file__],
            "without --eval-every",
        ),
        ([__file__, "--model", "tiny", "--task-seed", "1"], "--task-seed"),
        (["chain-sum", "--resume", "run-1", "--warm-up", "3"], "--warm-up"),
    ],
)
def test_wrong_arguments_are_named(tiny_service: LocalService, arguments: list[str], says: str):
    expect = 6 if says in {"clip_low", "rloo"} else 2
    assert says in run_tensafe(tiny_service, "train", "rlvr", *arguments, expect=expect).stderr


def test_ctrl_c_saves_and_the_command_it_prints_goes_on(tiny_service: LocalService):
    short = ["--prompts", "2", "--group-size", "2", "--max-tokens", "2", "--iterations", "100000"]
    process = start_tensafe(
        tiny_service,
        *("--profile", "local", "train", "rlvr", "chain-sum", "--model", "tiny"),
        *(*short, "--set", "filter_equal_groups=false"),
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not lines[-1].startswith("iteration 3/"):
        assert lines[-1], "it ended before iteration 3"
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    again = re.search(r"^  tensafe (.*)$", printed, re.M)
    assert again
    words = shlex.split(again[1])
    done = int(re.findall(r"^iteration (\d+)/", "".join(lines) + printed, re.M)[-1])
    words[words.index("--iterations") + 1] = str(done + 2)
    resumed = run_tensafe(tiny_service, *words).stdout
    assert re.findall(r"^iteration (\d+)/", resumed, re.M) == [str(done + 1), str(done + 2)]


def test_a_training_with_a_seed_goes_on_with_it(tiny_service: LocalService):
    short = ["--prompts", "2", "--group-size", "2", "--max-tokens", "2", "--checkpoint-every", "1"]
    rlvr(tiny_service, "chain-sum", "--model", "tiny", "--seed", "5", *short, "--iterations", "1")
    (newest, *_) = json.loads(run_tensafe(tiny_service, "runs", "list", "--json").stdout)
    on = ["chain-sum", "--resume", str(newest["id"]), *short, "--iterations", "2"]
    resumed = rlvr(tiny_service, *on)
    assert [event["event"] for event in resumed] == ["iteration", "saved"]
    assert resumed[0]["iteration"] == 2
    whole = rlvr(
        tiny_service,
        *("chain-sum", "--model", "tiny", "--seed", "5", *short, "--iterations", "2"),
    )
    same = ("reward_mean", "response_tokens", "sampled_tokens")
    assert [resumed[0][name] for name in same] == [whole[1][name] for name in same]
    assert resumed[0]["entropy"] == pytest.approx(whole[1]["entropy"], abs=1e-4)


def test_another_task_is_refused_on_resume(tiny_service: LocalService, tmp_path: Path):
    short = ["--prompts", "2", "--group-size", "2", "--max-tokens", "2", "--iterations", "1"]

    def begun(*task: str) -> str:
        rlvr(tiny_service, *task, "--model", "tiny", *short)
        (newest, *_) = json.loads(run_tensafe(tiny_service, "runs", "list", "--json").stdout)
        return str(newest["id"])

    def refused(run_id: str, *task: str) -> str:
        again = ["train", "rlvr", *task, "--resume", run_id, *short]
        return run_tensafe(tiny_service, *again, expect=6).stderr

    run_id = begun("chain-sum", "--task-seed", "3")
    assert "task_seed is 4, and was 3" in refused(run_id, "chain-sum", "--task-seed", "4")
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text('{"prompt": "a", "answer": "b"}\n')
    other.write_text('{"prompt": "a", "answer": "c"}\n')
    judged = ["--reward", "exact_match"]
    assert "task is 'file of sha256" in refused(run_id, str(one), *judged)
    run_id = begun(str(one), *judged)
    other_reward = ["--reward", "numeric_match"]
    assert "reward is 'numeric_match', and was" in refused(run_id, str(one), *other_reward)
    ignoring = [*judged, "--reward-options", '{"ignore_case": true}']
    assert "reward_options is" in refused(run_id, str(one), *ignoring)
    assert "task is 'file of sha256" in refused(run_id, str(other), *judged)
    moved = one.rename(tmp_path / "moved.jsonl")
    assert rlvr(tiny_service, str(moved), *judged, "--resume", run_id, *short)[-1]["artifact_id"]
