"""What every test may use: a service of real processes, started once for the session."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Tests start services by the same code that the scripts use.
sys.path.insert(0, str(ROOT / "scripts"))

from local_service import LocalService, local_service  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background; processes that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """`tensafe up --backend mock`, with the first tenant's key and an admin key."""
    with local_service(directory=tmp_path_factory.mktemp("service")) as running:
        yield running
