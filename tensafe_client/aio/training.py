"""The client of one run, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from tensafe_client.api import Api
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import RunInfo
from tensafe_client.operations import RunOperations
from tensafe_client.private_training import PrivateSteps, check_on_step
from tensafe_client.results import (
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
    StepMetrics,
)
from tensafe_client.samples import SampleResult
from tensafe_client.sampling import RunSampling
from tensafe_client.sequence import RunSequence
from tensafe_client.session import Session
from tensafe_client.streams import iterate_async
from tensafe_client.token_streams import AsyncSampleStream


class AsyncTrainingClient(RunOperations):
    """One run. Every operation returns an awaitable `OperationFuture` at once.

    So `await tc.sample(…)` gives the result, and operations may be pipelined freely: submit many,
    then await each. See `tensafe_client.TrainingClient` for the arguments.
    """

    def __init__(self, session: Session, info: RunInfo, sequence: RunSequence) -> None:
        super().__init__(session, info, sequence)
        self._api = Api(session)

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[True], **options: Unpack[RunSampling]
    ) -> AsyncSampleStream: ...

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[False] = False, **options: Unpack[RunSampling]
    ) -> OperationFuture[SampleResult]: ...

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
        top_logprobs: int | None = None,
        prompt_logprobs: bool | None = None,
        step: int | None = None,
        artifact: str | None = None,
        deadline_s: float | None = None,
        stream: bool = False,
    ) -> OperationFuture[SampleResult] | AsyncSampleStream:
        """Generates text: await the result, or iterate an `AsyncSampleStream`, with `stream`."""
        future = self._submit_sample(
            prompts,
            {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "seed": seed,
                "stop": stop,
                "num_samples": num_samples,
                "top_logprobs": top_logprobs,
                "prompt_logprobs": prompt_logprobs,
                "step": step,
                "artifact": artifact,
                "deadline_s": deadline_s,
            },
            stream=stream,
        )
        return AsyncSampleStream(self._session, future) if stream else future

    async def train_private(
        self,
        steps: int,
        learning_rate: float | Callable[[int], float] | None = None,
        on_step: Callable[[OptimStepResult], None] | None = None,
    ) -> list[OptimStepResult]:
        """Trains privately, on batches that the server draws from the run's dataset."""
        check_on_step(on_step)
        results = []
        async for result in PrivateSteps(self, steps, learning_rate):
            results.append(result)
            if on_step is not None:
                on_step(result)
        return results

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
