"""The allocator's setting, and that a worker has it from its first instruction."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from workers.allocator import suited

_OURS = (
    "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"
    ":glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"
)
_FAULTS = """
import resource, threading
import torch
torch.set_num_threads(1)

def step():
    return [torch.ones(250_000) for _ in range(200)]

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""
_CHILDREN = """
import multiprocessing
from workers.allocator import restart_suited

if __name__ == "__main__":
    codes = []
    for kind in multiprocessing.get_all_start_methods():
        child = multiprocessing.get_context(kind).Process(target=restart_suited)
        child.start()
        child.join(30)
        codes.append(child.exitcode)
    print(*codes)
"""
_PRINT = """
import os
from workers.allocator import restart_suited
print(os.getpid(), flush=True)
restart_suited()
print(os.environ.get("GLIBC_TUNABLES"), *os.sys.argv[1:])
"""


def test_it_adds_its_settings_and_leaves_the_rest():
    assert suited({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": _OURS}
    assert suited({"GLIBC_TUNABLES": "glibc.malloc.check=3"}) == {
        "GLIBC_TUNABLES": f"glibc.malloc.check=3:{_OURS}"
    }
    own = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    assert suited(own)["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:" + _OURS.replace(
        "glibc.malloc.arena_max=1:", ""
    )
    assert suited(suited(own)) == suited(own)
    older = {"MALLOC_ARENA_MAX": "8", "MALLOC_TRIM_THRESHOLD_": "1"}
    assert "arena" not in suited(older)["GLIBC_TUNABLES"]
    assert "trim" not in suited(older)["GLIBC_TUNABLES"]
    assert "mmap" in suited(older)["GLIBC_TUNABLES"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_tensors_of_any_thread_reuse_the_memory_of_those_that_are_gone():
    own = subprocess.run(
        [sys.executable, "-c", _FAULTS],
        env=suited(_bare()),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # 200 MB in pages of 4 KB, five times: 250,000 if each were mapped anew.
    assert int(own.stdout) < 25_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_process_starts_anew_once_with_its_arguments_and_its_pid(tmp_path):
    script = tmp_path / "prints.py"
    script.write_text(_PRINT)
    done = subprocess.run(
        [sys.executable, str(script), "one", "two words"],
        env={**_bare(), "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert last == f"{_OURS} one two words"


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


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
def test_one_that_cannot_be_started_anew_goes_on_without_it(tmp_path: Path, executable: str):
    script = tmp_path / "prints.py"
    script.write_text(f"import sys\nsys.executable = {executable!r}\n" + _PRINT)
    assert _lines(script)[1:] == ["None"]


def test_a_child_of_multiprocessing_goes_on_without_it(tmp_path: Path):
    script = tmp_path / "prints.py"
    script.write_text(_CHILDREN)
    assert _lines(script) == ["0 0 0"]


def _lines(script: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**_bare(), "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def _bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
