"""What generates text: several operations at once, a token of each of their rows at a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from workers.operations import SampleChunk, SampleOutcome, SampleRequest

OnChunk = Callable[[SampleChunk], None]


class Sampler(Protocol):
    """Decodes running operations together; another engine may stand behind it.

    All calls come from one thread. Operations are apart: whatever becomes of one, others go on.

        sampler.submit("op-1", 7, request)
        while sampler.busy:
            sampler.step()
            for operation_id, outcome in sampler.collect():
                ...
    """

    def submit(
        self,
        operation_id: str,
        key: str | int,
        request: SampleRequest,
        on_chunk: OnChunk | None = None,
    ) -> None:
        """Takes an operation in. Its weights are those of this moment, whatever changes later.

        Draws come from `params.seed`. Without one, they come from the run's seed and `key` (the
        operation's seq) for current weights; from the saved run's seed and step for an artifact or
        a saved version, so that the same call gives the same text; and from `key` (its id) for a
        base model.

        Args:
            operation_id: unknown to the sampler; what `collect` and `cancel` call it.
            on_chunk: gets what is new of each row of a request that streams, from within `step`.

        Raises:
            TenSafeFault: the request cannot be served; nothing was taken in.
        """

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""

    def step(self) -> None:
        """Adds a token to every row that runs; before that, waiting rows take free places.
        Does a bounded amount of work."""

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        """Operations that have ended since the last call, and what came of them."""

    def cancel(self, operation_id: str) -> None:
        """Ends an operation at once: no further step works for it, and it is not collected. An
        unknown one is no error."""
