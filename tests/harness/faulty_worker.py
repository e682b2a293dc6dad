"""A worker with the mock backend that a batch's first token makes wait, hang or crash.

    python faulty_worker.py --connect HOST:PORT …

It takes the options of `tensafe worker`. Where a forward_backward's first token is GATE, a sample's
prompt is GATED, or a save_state's metadata named one, the operation waits until the test opens the
FIFO named by FAULTY_GATE; other samples wait as `gated_sampler` says. CRASH_LATER crashes the
worker while the file named by FAULTY_DEADLY is there; the other marks are below. Taking on a run of
HANGING_SEED hangs; to forget one of BREAKING_SEED fails, which is no operation's failure. What it
saves tells which worker did. With FAULTY_WATCHDOG set, its watchdog never bites.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

GATE, HANG, HANG_WITH_LOCK, CRASH, CRASH_LATER = 60_001, 60_002, 60_003, 60_004, 60_005
HANGING_SEED, BREAKING_SEED = 60_006, 60_007
GATED = "wait at the gate"


def pass_gate() -> None:
    """Blocks until somebody writes to the FIFO."""
    with Path(os.environ["FAULTY_GATE"]).open("rb") as gate:
        gate.read()


def act_on(mark: int) -> None:
    if mark == GATE:
        pass_gate()
    elif mark == HANG:
        hang_for_ever()
    elif mark == HANG_WITH_LOCK:
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock
    elif mark == CRASH or (mark == CRASH_LATER and Path(os.environ["FAULTY_DEADLY"]).exists()):
        os.kill(os.getpid(), signal.SIGKILL)


def hang_for_ever() -> None:
    threading.Event().wait()


def main() -> None:
    from harness.gated_sampler import GatedSampler, with_other_text
    from workers import cli, link
    from workers.mock import MockBackend

    class FaultyBackend(MockBackend):
        """Not instant, so that it reports what has begun; few credits, so that much waits."""

        instant = False
        credits = 8
        sample_tokens = 4096

        def __init__(self):
            super().__init__()
            self._sampler = GatedSampler(self._begin_sample)

        def _begin_sample(self, request):
            if any(prompt.text == GATED for prompt in request.prompts):
                pass_gate()
            return with_other_text(self._sample(request))

        def open_run(self, run_id, settings, state):
            if settings.seed == HANGING_SEED:
                hang_for_ever()
            super().open_run(run_id, settings, state)

        def close_run(self, run_id):
            if run_id in self._runs and self._runs[run_id].settings.seed == BREAKING_SEED:
                raise ValueError("nobody knows why")
            super().close_run(run_id)

        def forward_backward(self, run_id, seq, request):
            act_on(int(request.batch.input_tokens[0]))
            return super().forward_backward(run_id, seq, request)

        def save_state(self, run_id, directory, include_optimizer):
            outcome = super().save_state(run_id, directory, include_optimizer)
            (directory / "saved_by.txt").write_text(os.environ["FAULTY_NAME"])
            if "FAULTY_GATED_SAVE" in os.environ:
                pass_gate()
            return outcome

    if "FAULTY_WATCHDOG" in os.environ:
        link.Watchdog.start = link.Watchdog.close = lambda watchdog: None  # type: ignore[assignment]
    cli._backend = lambda *_: FaultyBackend()  # type: ignore[assignment]
    cli.worker(prog_name="faulty-worker")


if __name__ == "__main__":
    sys.exit(main())
