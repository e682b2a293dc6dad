"""Interpreter exit and fork."""

from __future__ import annotations

import subprocess
import sys

from fake_server import API_KEY, FakeCoordinator

HEAD = """
import os, sys
from tensafe_client import ClientClosedError, ServiceClient

client = ServiceClient("127.0.0.1:{port}", api_key="{key}")
tc = client.create_training_client({{"model_ref": "m"}})


def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


"""


def run(server: FakeCoordinator, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(port=server.port, key=API_KEY) + program],
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


def test_a_forked_child_says_why_it_cannot_connect(server: FakeCoordinator) -> None:
    done = run(
        server,
        """
def work():
    for attempt in (tc.optim_step, client.runs, lambda: ServiceClient(client.target)):
        try:
            attempt()
        except ClientClosedError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError("no error")


assert tc.optim_step().result(timeout=10).step == 1
in_child(work)
print(tc.optim_step().result(timeout=10).step)
""",
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_child_forked_before_the_first_call_has_a_loop_of_its_own(
    server: FakeCoordinator,
) -> None:
    program = """
import os
from tensafe_client import ServiceClient

client = ServiceClient("127.0.0.1:{port}", api_key="{key}")
for _ in range(2):
    child = os.fork()
    if child == 0:
        with ServiceClient(client.target, api_key="{key}") as own:
            tc = own.create_training_client({{"model_ref": "m"}})
            print(tc.optim_step().result(timeout=10).step, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print(len(client.runs()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program.format(port=server.port, key=API_KEY)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "1\n1\n2\n"), done.stderr
