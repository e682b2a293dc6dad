"""The client of a service, for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from tensafe_client.aio.admin import AsyncAdmin
from tensafe_client.aio.training import AsyncTrainingClient
from tensafe_client.config import TrainingConfig
from tensafe_client.connection import ClientConfig
from tensafe_client.data.datum import Datum
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import ArtifactInfo, ModelInfo, OperationInfo, RunInfo, VerifyReport
from tensafe_client.losses import LossInfo
from tensafe_client.privacy_report import DatasetInfo, PrivacyReport
from tensafe_client.samples import SampleResult
from tensafe_client.sampling import OtherSampling
from tensafe_client.service import ServiceBase
from tensafe_client.token_streams import AsyncSampleStream


class AsyncServiceClient(ServiceBase):
    """A connection to a TenSafe service; `tensafe_client.ServiceClient`, awaited.

    It may be used from any event loop: its own I/O runs on the SDK's loop.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, Any] | str | None = None,
        *,
        target: str | None = None,
        api_key: str | None = None,
        profile: str | None = None,
        timeout_s: float | None = None,
        ca: str | Path | None = None,
    ) -> None:
        super().__init__(
            config, target=target, api_key=api_key, profile=profile, timeout_s=timeout_s, ca=ca
        )
        self._io = self._session.io
        self.admin = AsyncAdmin(self._session)

    async def create_training_client(
        self,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        *,
        from_artifact: str | None = None,
        include_optimizer: bool | None = None,
    ) -> AsyncTrainingClient:
        """Creates a run, on request one that begins with an artifact's state."""
        info, sequence = await self._io.bridge(
            self._api.create_run_from(config, from_artifact, include_optimizer)
        )
        return AsyncTrainingClient(self._session, info, sequence)

    async def training_client(self, run_id: str) -> AsyncTrainingClient:
        """Attaches to a run, also one of another process."""
        info, sequence = await self._io.bridge(self._api.attach_run(run_id))
        return AsyncTrainingClient(self._session, info, sequence)

    async def future(self, operation_id: str) -> OperationFuture[Any]:
        """Rebuilds the handle on an operation, in any process; await it for the result."""
        return await self._io.bridge(self._api.future(operation_id))

    async def runs(
        self, *, include_deleted: bool = False, limit: int | None = None
    ) -> list[RunInfo]:
        """Lists runs, newest first."""
        return await self._io.bridge(self._api.runs(include_deleted, limit))

    async def run(self, run_id: str) -> RunInfo:
        """Reads a run."""
        return await self._io.bridge(self._api.run(run_id))

    async def delete_run(self, run_id: str) -> RunInfo:
        """Deletes a run; its queued operations are cancelled, its artifacts stay."""
        return await self._io.bridge(self._api.delete_run(run_id))

    async def verify_run(
        self, run_id: str, *, on_progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Replays a run from its log on a worker, and compares the results; see the sync twin."""
        return await self._io.bridge(self._api.verify_run(run_id, on_progress))

    async def operations(
        self, run_id: str | None = None, *, limit: int | None = None
    ) -> list[OperationInfo]:
        """Lists operations, newest first; of one run, or all of the tenant's."""
        return await self._io.bridge(self._api.operations(run_id, limit))

    async def operation(self, operation_id: str) -> OperationInfo:
        """Reads an operation."""
        return await self._io.bridge(self._api.operation(operation_id))

    async def cancel(self, operation_id: str) -> bool:
        """Cancels an operation; True only if it never ran."""
        return await self._io.bridge(self._api.cancel(operation_id))

    async def artifacts(
        self, run_id: str | None = None, *, limit: int | None = None
    ) -> list[ArtifactInfo]:
        """Lists artifacts, newest first; of one run, or all of the tenant's."""
        return await self._io.bridge(self._api.artifacts(run_id, limit))

    async def artifact(self, artifact_id: str) -> ArtifactInfo:
        """Reads an artifact's description."""
        return await self._io.bridge(self._api.artifact(artifact_id))

    async def download_artifact(self, artifact_id: str, directory: str | Path) -> Path:
        """Downloads an artifact's files; a download that broke off goes on where it stopped."""
        return await self._io.bridge(self._downloads.artifact(artifact_id, directory))

    async def upload_artifact(
        self,
        directory: str | Path,
        model_ref: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
    ) -> ArtifactInfo:
        """Uploads an adapter that was made elsewhere; one that broke off goes on."""
        return await self._io.bridge(self._uploads.artifact(directory, model_ref, metadata, ttl_s))

    async def delete_artifact(self, artifact_id: str) -> None:
        """Deletes an artifact and its files."""
        await self._io.bridge(self._api.delete_artifact(artifact_id))

    async def upload_dataset(
        self, source: str | Path | Iterable[Datum], name: str | None = None
    ) -> DatasetInfo:
        """Uploads a dataset, from which the server draws the batches of private runs."""
        return await self._io.bridge(self._datasets.upload(source, name))

    async def datasets(self) -> list[DatasetInfo]:
        """Lists the uploaded datasets, newest first."""
        return await self._io.bridge(self._datasets.all())

    async def dataset(self, dataset_id: str) -> DatasetInfo:
        """Reads a dataset's description."""
        return await self._io.bridge(self._datasets.get(dataset_id))

    async def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset's content; its privacy ledger stays.

        Raises:
            DatasetInUseError: while a run draws from it.
        """
        await self._io.bridge(self._datasets.delete(dataset_id))

    async def privacy_report(self, run_id: str) -> PrivacyReport:
        """Says what a private run and all others on its dataset have released."""
        return await self._io.bridge(self._datasets.report(run_id))

    async def models(self) -> list[ModelInfo]:
        """Lists the models that the operator has registered."""
        return await self._io.bridge(self._api.models())

    async def model(self, model_ref: str) -> ModelInfo:
        """Reads a model."""
        return await self._io.bridge(self._api.model(model_ref))

    async def losses(self, model_ref: str | None = None) -> list[LossInfo]:
        """Lists the losses that runs may use, with what each takes and gives."""
        return await self._io.bridge(self._api.losses(model_ref))

    async def tokenizer_files(self, model_ref: str) -> dict[str, bytes]:
        """Fetches a model's tokenizer, name → content."""
        return await self._io.bridge(self._downloads.tokenizer(model_ref))

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[True], **options: Unpack[OtherSampling]
    ) -> AsyncSampleStream: ...

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[False] = False, **options: Unpack[OtherSampling]
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
        model: str | None = None,
        artifact: str | None = None,
        deadline_s: float | None = None,
        stream: bool = False,
    ) -> OperationFuture[SampleResult] | AsyncSampleStream:
        """Generates text from a base model or an artifact: await the result, or iterate an
        `AsyncSampleStream` with `stream=True`."""
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
                "model": model,
                "artifact": artifact,
                "deadline_s": deadline_s,
            },
            stream=stream,
        )
        return AsyncSampleStream(self._session, future) if stream else future

    async def close(self) -> None:
        """Sends what still waits, then ends the connection; operations go on."""
        await self._io.bridge(self._session.close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
