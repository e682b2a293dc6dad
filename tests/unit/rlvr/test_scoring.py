"""Rewards in processes: what they give, and what becomes of those that fail, hang or die."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensafe_client import ConfigError
from tensafe_client.rlvr import Problem, PromptSet, Reply, rewards
from tensafe_client.rlvr.scoring import Failure, ScoringPool


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Trap(str):
    """Text that is unpickled as something else, which any function may give."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (9,)


@dataclass
class Misbehaving:
    """Does what the completion says."""

    def problem(self, index: int) -> Problem:
        return Problem(str(index))

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        said = completions[-1]
        if said == "raise":
            raise RuntimeError("no idea")
        if said == "hang":
            threading.Event().wait()
        if said == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if said == "print":
            print("this is not an answer")
        if said == "nan":
            return Reply(float("nan"))
        if said == "numpy":
            return Reply({"reward": np.float32(0.5), "right": np.int64(1)})
        if said == "words":
            return Reply({"reward": 1, "x": "str"})
        if said == "none":
            return Reply({"reward": 1, "x": None})
        if said == "number":
            return 1.0  # type: ignore[return-value]
        if said == "then":
            return Reply(1.0, then=5)  # type: ignore[arg-type]
        if said == "half":
            return Reply(1.0, then="\ud800")
        if said == "mute":
            raise Mute
        if said == "trap":
            return Reply({"reward": 1.0, Trap("name"): 1}, then=Trap("go on"))
        if said == "pid":
            return Reply(float(os.getpid()))
        return Reply({"reward": len(said), "turns": len(completions)}, then="go on")


def test_replies_come_as_the_environment_gives_them():
    with ScoringPool(Misbehaving(), processes=2) as pool:
        waiting = [pool.submit(Problem("p"), ["a", "b" * n]) for n in range(20)]
        for n, future in enumerate(waiting):
            assert future.result() == Reply({"reward": n, "turns": 2}, then="go on")
        assert pool.submit(Problem("p"), ["print"]).result() == Reply(
            {"reward": 5, "turns": 1}, then="go on"
        )


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("raise", "error", "RuntimeError: no idea"),
        ("nan", "error", "ValueError: a reward must be finite, got nan"),
        ("words", "error", "TypeError: the reward's part 'x' must be a number, got 'str'"),
        ("none", "error", "TypeError: the reward's part 'x' must be a number, got None"),
        ("number", "error", "TypeError: an environment's reply must be a Reply, got 1.0"),
        ("then", "error", "TypeError: a Reply's then must be text or None, got 5"),
        (
            "half",
            "error",
            "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0: "
            "surrogates not allowed",
        ),
        ("mute", "error", "Mute: it has no text: RuntimeError"),
        ("hang", "timeout", "no reward within 2 s"),
        ("die", "crash", "the process that computed it ended"),
    ],
)
def test_a_reward_that_fails_is_told_and_the_next_one_comes(said, kind, message):
    with ScoringPool(Misbehaving(), processes=1, timeout_s=2) as pool:
        assert pool.submit(Problem("p"), [said]).result() == Failure(kind, message)
        assert isinstance(pool.submit(Problem("p"), ["fine"]).result(), Reply)


def test_numpys_numbers_come_as_plain_ones():
    with ScoringPool(Misbehaving(), processes=1) as pool:
        reply = pool.submit(Problem("p"), ["numpy"]).result()
    assert isinstance(reply, Reply)
    assert isinstance(reply.reward, dict)
    assert reply.reward == {"reward": 0.5, "right": 1.0}
    assert {type(value) for value in reply.reward.values()} == {float}


def test_a_reply_comes_as_plain_text_whatever_its_class():
    with ScoringPool(Misbehaving(), processes=1) as pool:
        reply = pool.submit(Problem("p"), ["trap"]).result()
    assert reply == Reply({"reward": 1.0, "name": 1.0}, then="go on")


def _started(path: Path, reward: Any, timeout_s: float) -> tuple[ScoringPool, int]:
    """A pool whose reward has started a process and hangs, and a handle of that process."""
    os.mkfifo(path)
    pool = ScoringPool(PromptSet([Problem("p")], reward), processes=1, timeout_s=timeout_s)
    pool.submit(Problem("p"), ["abc"])
    return pool, os.pidfd_open(int(path.read_text()))


@pytest.mark.parametrize("closed", [False, True], ids=["too long", "closed"])
def test_what_a_reward_has_started_ends_with_its_process(tmp_path: Path, closed: bool):
    told = tmp_path / "told"

    def reward(prompt, completion, meta):
        started = subprocess.Popen(["sleep", "3600"])
        told.write_text(str(started.pid))
        threading.Event().wait()

    pool, handle = _started(told, reward, 3600 if closed else 2)
    if closed:
        pool.close()
    assert select.select([handle], [], [], 60)[0], "it goes on"
    pool.close()
    os.close(handle)


def test_functions_of_a_script_and_lambdas_go_too():
    def reward(prompt, completion, meta):
        return meta["times"] * len(completion)

    prompts = PromptSet([Problem("p", {"times": 2})], reward)
    with ScoringPool(prompts, processes=1) as pool:
        assert pool.submit(prompts.problem(0), ["abc"]).result() == Reply(6)


def test_what_cannot_be_pickled_is_refused_at_once():
    lock = threading.Lock()

    def reward(prompt, completion, meta):
        with lock:
            return 1.0

    with pytest.raises(ConfigError, match="environment") as caught:
        ScoringPool(PromptSet([Problem("p")], reward))
    assert caught.value.violations
    with pytest.raises(ConfigError, match="processes"):
        ScoringPool(PromptSet([Problem("p")], rewards.ExactMatch()), processes=0)


def test_closing_ends_what_hangs():
    pool = ScoringPool(Misbehaving(), processes=1, timeout_s=3600)
    pid = int(pool.submit(Problem("p"), ["pid"]).result().reward)  # type: ignore[union-attr,arg-type]
    hanging = pool.submit(Problem("p"), ["hang"])
    while not hanging.running():
        os.sched_yield()
    pool.close()
    assert isinstance(hanging.result(10), Failure)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path):
    """As `multiprocessing` would; and a reward defined in it goes all the same."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tensafe_client.rlvr import Problem, PromptSet\n"
        "from tensafe_client.rlvr.scoring import ScoringPool\n"
        "print('begun')\n"
        "def reward(prompt, completion, meta):\n"
        "    return float(len(completion))\n"
        "with ScoringPool(PromptSet([Problem('p')], reward), processes=2) as pool:\n"
        "    print(pool.submit(Problem('p'), ['abc']).result().reward)\n"
    )
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout == "begun\n3.0\n"


def test_processes_end_with_their_parent_even_while_a_reward_hangs(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, threading\n"
        "from tensafe_client.rlvr import Problem, PromptSet\n"
        "from tensafe_client.rlvr.scoring import ScoringPool\n"
        "def reward(prompt, completion, meta):\n"
        "    started = subprocess.Popen(['sleep', '3600'])\n"
        "    print(os.getpid(), started.pid, flush=True)\n"
        "    threading.Event().wait()\n"
        "pool = ScoringPool(PromptSet([Problem('p')], reward), processes=1, timeout_s=3600)\n"
        "pool.submit(Problem('p'), ['abc']).result()\n"
    )
    with subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        handles = [os.pidfd_open(int(pid)) for pid in parent.stderr.readline().split()]
        parent.kill()
    for handle in handles:
        assert select.select([handle], [], [], 30)[0], "it outlives its parent"
        os.close(handle)
