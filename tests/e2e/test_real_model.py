"""The scripts on the real model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run_script(*arguments: str, timeout_s: float) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.mark.timeout(600)
def test_smoke_on_the_real_model():
    output = run_script("scripts/baseline_sft_smoke.py", "--backend", "torch", timeout_s=550)
    lines = output.splitlines()
    assert lines[0] == "=== TenSafe Baseline SFT Smoke Test ==="
    assert lines[-1] == "=== All baseline tests passed! ==="
    assert len(re.findall(r"^\[Step \d+/20\] loss=[\d.]+, grad_norm=[\d.]+$", output, re.M)) == 20
    assert "  Loss decreased: True" in lines
    assert "Mock" not in output


@pytest.mark.timeout(900)
def test_demo():
    output = run_script("scripts/demo.py", "--steps", "8", timeout_s=850)
    falls = re.findall(r"^  (alice|bob): held-out loss ([\d.]+) → ([\d.]+)$", output, re.M)
    assert [name for name, *_ in falls] == ["alice", "bob"]
    assert all(float(after) < float(before) for _, before, after in falls)
    assert "exit status 0" in output
