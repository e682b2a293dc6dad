"""The mock's sampler, which waits in the middle of a text until a test lets it go on.

A prompt `gate 5` is continued with five tokens and then waits for the file named by
FAULTY_SAMPLE_GATE; a sample that does not stream waits before its first one. Where FAULTY_TEXT is
set, the last characters of every completion are it, as if this worker computed differently.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from workers.mock_sampler import MockSampler, _Job
from workers.operations import SampleOutcome

_PAUSE_S = 0.002


class GatedSampler(MockSampler):
    """See the module."""

    def step(self) -> None:
        going = [job for job in self._jobs.values() if not _held(job)]
        for job in going:
            job.tell()
        if not going:
            time.sleep(_PAUSE_S)  # nothing to do but to look again

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        held = {name: job for name, job in self._jobs.items() if _held(job)}
        for name in held:
            del self._jobs[name]
        try:
            return super().collect()
        finally:
            self._jobs |= held


def _held(job: _Job) -> bool:
    word, _, count = job.outcome.completions[0].prompt.partition(" ")
    if word != "gate" or Path(os.environ["FAULTY_SAMPLE_GATE"]).exists():
        return False
    return job.on_chunk is None or job.told >= int(count)


def with_other_text(outcome: SampleOutcome) -> SampleOutcome:
    """Completions of the same length that end otherwise, if the environment says so."""
    ending = os.environ.get("FAULTY_TEXT", "")
    for completion in outcome.completions if ending else ():
        completion.text = completion.text[: -len(ending)] + ending
        completion.tokens = np.frombuffer(completion.text.encode(), np.uint8).astype(np.int32)
    return outcome
