"""The client of one run, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

from tensafe_client.api import Api
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import RunInfo
from tensafe_client.operations import RunOperations
from tensafe_client.results import LoadStateResult, SampleResult, SaveStateResult, StepMetrics
from tensafe_client.sequence import RunSequence
from tensafe_client.session import Session
from tensafe_client.streams import iterate_async


class AsyncTrainingClient(RunOperations):
    """One run. Every operation returns an awaitable `OperationFuture` at once.

    So `await tc.sample(…)` gives the result, and operations may be pipelined freely: submit many,
    then await each. See `tensafe_client.TrainingClient` for the arguments.
    """

    def __init__(self, session: Session, info: RunInfo, sequence: RunSequence) -> None:
        super().__init__(session, info, sequence)
        self._api = Api(session)

    def sample(
        self,
        prompts: Any,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: Any = None,
        num_samples: int | None = None,
        *,
        step: int | None = None,
        artifact: str | None = None,
        deadline_s: float | None = None,
    ) -> OperationFuture[SampleResult]:
        """Generates text; await the result."""
        return self.sample_async(
            prompts,
            max_tokens,
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            stop,
            num_samples,
            step=step,
            artifact=artifact,
            deadline_s=deadline_s,
        )

    def save_state(
        self,
        metadata: Mapping[str, Any] | None = None,
        include_optimizer: bool | None = None,
        ttl_s: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[SaveStateResult]:
        """Saves the adapter as an artifact; await the result."""
        return self.save_state_async(metadata, include_optimizer, ttl_s, deadline_s=deadline_s)

    def load_state(
        self,
        artifact_id: str,
        include_optimizer: bool | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[LoadStateResult]:
        """Replaces the run's state by an artifact's; await the result."""
        return self.load_state_async(artifact_id, include_optimizer, deadline_s=deadline_s)

    def metrics(self, follow: bool = False, since: int = 0) -> AsyncGenerator[StepMetrics, None]:
        """Iterates the metrics of each applied update, as the server pushes them."""
        return iterate_async(self._session.io, self._api.metrics(self.run_id, since, follow))

    async def refresh(self) -> RunInfo:
        """Asks the server for the run, and updates `info`, `status` and `step`."""
        return self._take_info(await self._session.io.bridge(self._api.run(self.run_id)))

    async def delete(self) -> RunInfo:
        """Deletes the run; its queued operations are cancelled, its artifacts stay."""
        return self._take_info(await self._session.io.bridge(self._api.delete_run(self.run_id)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the run as it is."""
