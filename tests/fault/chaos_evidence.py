"""What a chaos run that failed leaves behind: logs, the store, and a message that names them."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.cluster import Cluster

KEPT = Path(__file__).resolve().parents[2] / "build" / "chaos"
_TAIL_LINES = 15


@contextmanager
def kept_on_failure(cluster: Cluster, name: str) -> Iterator[None]:
    """Copies what the processes and the driver wrote to a folder of its own under `build/chaos`
    if something fails in here. Enter it before the cluster, so that they have ended by then.

    Raises:
        AssertionError: something failed; with its full text, every file's path and each log's end.
    """
    try:
        yield
    except BaseException as error:
        folder = _keep(cluster, name, error)
        logs = sorted(folder.glob("*.log"))
        files = "\n".join(f"  {path}" for path in sorted(folder.rglob("*")) if path.is_file())
        tails = "\n".join(f"--- {path.name}\n{_tail(path)}" for path in logs)
        raise AssertionError(
            f"{name}: {type(error).__name__}: {error}\n{tails}\nkept:\n{files}"
        ) from error


def _keep(cluster: Cluster, name: str, error: BaseException) -> Path:
    folder = KEPT / f"{name}-{time.strftime('%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    for log in cluster.home.glob("*.log"):
        shutil.copy(log, folder)
    for part in cluster.data.glob("tensafe.db*"):  # with the log that it has not taken in
        shutil.copy(part, folder)
    (folder / "failure.txt").write_text("".join(traceback.format_exception(error)))
    return folder


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
