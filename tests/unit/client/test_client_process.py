"""Interpreter exit and fork."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fake_server import API_KEY, FakeCoordinator

HEAD = f"""
import os, sys
from tensafe_client import ClientClosedError, ServiceClient
client = ServiceClient("127.0.0.1:{{port}}", api_key={API_KEY!r})
tc = client.create_training_client({{{{"model_ref": "m"}}}})
"""


def run(server: FakeCoordinator, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(port=server.port) + program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_exit_without_close_is_clean_and_loses_nothing(server: FakeCoordinator) -> None:
    server.hold = True
    done = run(server, "futures = [tc.optim_step() for _ in range(50)]")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [seq for seqs in server.batches for seq in seqs] == list(range(1, 51))


def test_exit_from_an_error_is_not_held_up(server: FakeCoordinator) -> None:
    server.hold = True
    done = run(server, "future = tc.optim_step()\nraise SystemExit(3)")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own_client(server: FakeCoordinator) -> None:
    done = run(
        server,
        """
assert tc.optim_step().result(timeout=10).step == 1
child = os.fork()
if child == 0:
    try:
        tc.optim_step()
    except ClientClosedError as error:
        assert "forked" in str(error)
        with ServiceClient(client.target, api_key="ts_test") as own:
            print(own.training_client(tc.run_id).optim_step().result(timeout=10).step, flush=True)
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
tc = client.training_client(tc.run_id)
print(tc.optim_step().result(timeout=10).step)
""",
    )
    assert (done.returncode, done.stdout) == (0, "2\n3\n"), done.stderr
