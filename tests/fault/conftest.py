"""What the fault tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault.order_world import World
from harness.tiny_model import save_tiny_model


@pytest.fixture
def world() -> Iterator[World]:
    """One run, and no process."""
    made = World(runs=1)
    yield made
    made.close()


@pytest.fixture
def run(world: World) -> str:
    """The world's only one."""
    [run_id] = world.next_seq
    return run_id


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model of two layers."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """Mounts a small disk of its own at a directory."""
    mounted: list[Path] = []

    def mount(directory: Path, mebibytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tensafe-test", str(directory)],
            capture_output=True,
            check=False,
        )
        if ran.returncode:
            pytest.skip(f"needs root to mount a small disk: {ran.stderr.decode()}")
        mounted.append(directory)

    yield mount
    for directory in reversed(mounted):
        subprocess.run(["umount", "-l", str(directory)], check=True)
