"""The allocator's setting, and that a worker has it from its first instruction."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from workers.allocator import suited

_PRINT = """
import os
from workers.allocator import restart_suited
print(os.getpid(), flush=True)
restart_suited()
print(os.environ.get("GLIBC_TUNABLES"), *os.sys.argv[1:])
"""


def test_it_adds_its_setting_and_leaves_the_rest():
    assert suited({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    assert suited({"GLIBC_TUNABLES": "glibc.malloc.check=3"}) == {
        "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.tcache_count=0"
    }
    own = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}
    assert suited(own) == own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_process_starts_anew_once_with_its_arguments_and_its_pid(tmp_path):
    script = tmp_path / "prints.py"
    script.write_text(_PRINT)
    bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, str(script), "one", "two words"],
        env={**bare, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert last == "glibc.malloc.tcache_count=0 one two words"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_one_that_is_not_left_its_setting_goes_on_without_it(tmp_path):
    """As an interpreter with file capabilities, such as for ports below 1024."""
    script = tmp_path / "prints.py"
    script.write_text("import os\nos.environ.pop('GLIBC_TUNABLES', None)\n" + _PRINT)
    done = subprocess.run(
        [sys.executable, str(script), "on"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout.splitlines()[2:] == ["None on"]
