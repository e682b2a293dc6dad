"""`python -m workers` as a process, and what it says about wrong options."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from click.testing import CliRunner
from unit.workers.planned import assignment, forward_backward, operation
from unit.workers.test_link import KEY, scenario, serving

from workers.allocator import suited
from workers.cli import worker
from workers.threads import _quota, pick_threads, usable_cores


@scenario
async def test_a_worker_process_serves_and_sigterm_ends_it_with_0():
    async with serving() as (coordinator, port):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "workers", "--backend", "mock"),
            *("--connect", f"grpc://127.0.0.1:{port}", "--name", "w"),
            env={**os.environ, "TENSAFE_WORKER_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert (await coordinator.registers.get()).name == "w"
            coordinator.send(operation(1, **forward_backward()), runs=[assignment()])
            (done,) = await coordinator.outcomes(1)
            assert done.HasField("result")
            process.send_signal(signal.SIGTERM)
            assert (await coordinator.said.get()).HasField("goodbye")
            _, log = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, log.decode()
        assert b"connected to" in log


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        (["--backend", "mock"], "", "TENSAFE_WORKER_KEY is not set"),
        (["--backend", "mock", "--model", "x"], "k", "the mock backend serves any model"),
        (["--backend", "mock", "--compile", "first"], "k", "leave out --pass-tokens"),
        (["--backend", "mock", "--cuda-graphs", "off"], "k", "leave out --pass-tokens"),
        (["--backend", "mock", "--sample-memory-mib", "9"], "k", "--sample-memory-mib"),
        ([], "k", "needs at least one --model"),
        (["--model", "/no/such/model"], "k", "there is no directory /no/such/model"),
        (["--model", "./here", "--device", "tpu"], "k", "no device 'tpu'"),
        (["--model", "./here", "--device", "cuda:99"], "k", "no device 'cuda:99'"),
    ],
)
def test_wrong_options_say_what_to_do(options, key, says):
    command = ["--connect", "127.0.0.1:1", "--threads", "1", *options]
    result = CliRunner().invoke(worker, command, env=suited({"TENSAFE_WORKER_KEY": key}))
    assert result.exit_code != 0
    assert says in result.output


def test_threads_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.threads.usable_cores", lambda: 8)
    assert [pick_threads(count) for count in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setattr("workers.threads.usable_cores", lambda: 200)
    assert pick_threads(1) == 16
    file = tmp_path / "cpu.max"
    assert _quota(file) is None
    file.write_text("max 100000\n")
    assert _quota(file) is None
    file.write_text("250000 100000\n")
    assert _quota(file) == 2.5
    assert usable_cores() >= 1
