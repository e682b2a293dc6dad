"""Client commands need what the bare install brings, and say which extra is missing for others."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "torch transformers tokenizers jinja2 peft safetensors gguf protovalidate grpc_health"
BLOCKED = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{*{HEAVY.split()!r}, "tensafe_server", "workers"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from tensafe_client.cli.main import main
main(prog_name="tensafe")
"""
CLIENT_COMMANDS = [
    ["--help"],
    ["train", "sft", "--help"],
    ["sample", "--help"],
    ["runs", "watch", "--help"],
    ["artifacts", "download", "--help"],
    ["models", "show", "--help"],
    ["operations", "cancel", "--help"],
    ["admin", "keys", "create", "--help"],
    ["profiles", "list"],
]


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", CLIENT_COMMANDS, ids=" ".join)
def test_client_commands_import_nothing_heavy(arguments: list[str]):
    ran = run_blocked(*arguments)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [("up", "server,worker"), ("server", "server"), ("worker", "worker")],
)
def test_a_missing_extra_is_named(command: str, extra: str):
    ran = run_blocked(command, "--help")
    assert ran.returncode == 1
    assert f"pip install 'tensafe[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_blocker_blocks():
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED.replace("from tensafe_client.cli.main", "import torch #")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode != 0
    assert "No module named 'torch'" in ran.stderr
