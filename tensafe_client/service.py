"""The client of a service, for code without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from tensafe_client import sampling, specs
from tensafe_client.admin import Admin
from tensafe_client.api import Api
from tensafe_client.config import TrainingConfig
from tensafe_client.connection import ClientConfig, Connection, resolve
from tensafe_client.data.datum import Datum
from tensafe_client.dataset_uploads import Datasets
from tensafe_client.downloads import Downloads
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import ArtifactInfo, ModelInfo, OperationInfo, RunInfo, VerifyReport
from tensafe_client.losses import LossInfo
from tensafe_client.privacy_report import DatasetInfo, PrivacyReport
from tensafe_client.samples import SampleResult
from tensafe_client.sampling import OtherSampling
from tensafe_client.session import Session
from tensafe_client.token_streams import SampleStream
from tensafe_client.training import TrainingClient
from tensafe_client.uploads import Uploads


class ServiceBase:
    """What the sync and the asyncio client share: the connection, and sampling without a run."""

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
        given: dict[str, Any] = {
            "target": target,
            "api_key": api_key,
            "profile": profile,
            "timeout_s": timeout_s,
            "ca": ca,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        self._session = Session(resolve(replace(ClientConfig.of(config), **chosen)))
        self._api = Api(self._session)
        self._downloads = Downloads(self._session)
        self._datasets = Datasets(self._session)
        self._uploads = Uploads(self._session)

    @property
    def connection(self) -> Connection:
        """The resolved target and timeout."""
        return self._session.connection

    @property
    def target(self) -> str:
        """Where it connects: `grpc://HOST:PORT`, or `grpcs://HOST:PORT` with TLS."""
        return str(self.connection.address)

    def sample_async(
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
    ) -> OperationFuture[SampleResult]:
        """Generates text from weights of no run; the future twin of `sample`."""
        return self._submit_sample(
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
        )

    def _submit_sample(
        self, prompts: Any, options: OtherSampling, *, stream: bool = False
    ) -> OperationFuture[SampleResult]:
        weights = sampling.other_weights(options.get("model"), options.get("artifact"))
        spec = sampling.sample(prompts, weights, options, stream=stream)
        specs.set_deadline(spec, options.get("deadline_s"))
        return self._session.submit_unnumbered("sample", spec)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.connection.host_port}>"


class ServiceClient(ServiceBase):
    """A connection to a TenSafe service.

        client = ServiceClient()                      # environment, or the saved profile
        client = ServiceClient("127.0.0.1:50051", api_key="ts_…")
        tc = client.create_training_client({"model_ref": "smollm2-135m"})

    Args:
        config: a target string, a dict or a `ClientConfig`. None: `TENSAFE_TARGET` and
            `TENSAFE_API_KEY`, else the profile that `tensafe up` saves.
        target: `HOST:PORT` or `grpc://HOST:PORT`, or `grpcs://HOST:PORT` for TLS; stands above the
            config's.
        api_key: secret of a key; stands above the config's.
        profile: name of a saved profile.
        timeout_s: longest time of one call with all repetitions, seconds; default 30. It does not
            limit operations, which run on the server while futures wait.
        ca: PEM file of the authority that signed the server's certificate, for `grpcs://`. None:
            `TENSAFE_CA`, else the profile's, else the well-known authorities.

    The first call connects and raises `ConnectionFailedError` if nothing answers within 10 s or
    `timeout_s`. After that the client reconnects by itself: futures only wait.

    Raises:
        ConfigError: for an unknown field, or if no target is known.
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
        self.admin = Admin(self._session)

    def create_training_client(
        self,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        *,
        from_artifact: str | None = None,
        include_optimizer: bool | None = None,
    ) -> TrainingClient:
        """Creates a run.

        Args:
            config: a `TrainingConfig`, or a dict of its fields. With `from_artifact` it may be
                left out, and a dict may leave out what is as in the run that was saved; an
                uploaded adapter brings its model and its LoRA shape.
            from_artifact: an artifact whose state the run begins with.
            include_optimizer: as in `TrainingClient.load_state`. True goes on exactly where the
                saved run was, False begins a fresh optimizer on its weights.

        Raises:
            ConfigError: for an unknown field, naming the closest valid one, or a wrong type.
            InvalidArgumentError: if the server refuses a value; it names the field.
            ModelNotFoundError: if the model is not registered.
            ArtifactMismatchError: if the artifact does not fit the config; no run is left.
        """
        info, sequence = self._io.run(
            self._api.create_run_from(config, from_artifact, include_optimizer)
        )
        return TrainingClient(self._session, info, sequence)

    def training_client(self, run_id: str) -> TrainingClient:
        """Attaches to a run, also one of another process: goes on with the server's next seq.

        Only one process at a time may drive a run.

        Raises:
            RunNotFoundError: if there is no such run.
            RunDeletedError: if it was deleted.
        """
        info, sequence = self._io.run(self._api.attach_run(run_id))
        return TrainingClient(self._session, info, sequence)

    def future(self, operation_id: str) -> OperationFuture[Any]:
        """Rebuilds the handle on an operation, in any process.

        Raises:
            OperationNotFoundError: if there is no such operation.
        """
        return self._io.run(self._api.future(operation_id))

    def runs(self, *, include_deleted: bool = False, limit: int | None = None) -> list[RunInfo]:
        """Lists runs, newest first; all of them, or at most `limit`."""
        return self._io.run(self._api.runs(include_deleted, limit))

    def run(self, run_id: str) -> RunInfo:
        """Reads a run."""
        return self._io.run(self._api.run(run_id))

    def delete_run(self, run_id: str) -> RunInfo:
        """Deletes a run; its queued operations are cancelled, its artifacts stay."""
        return self._io.run(self._api.delete_run(run_id))

    def verify_run(
        self, run_id: str, *, on_progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Replays a run from its log on a worker, beside the run itself, and compares the results.

        Args:
            run_id: the run.
            on_progress: called with (replayed, total) operations, on the SDK's thread.

        Raises:
            RunNotFoundError: if there is no such run.
            ConnectionFailedError: if no worker serves its model, or the worker was lost.
        """
        return self._io.run(self._api.verify_run(run_id, on_progress))

    def operations(
        self, run_id: str | None = None, *, limit: int | None = None
    ) -> list[OperationInfo]:
        """Lists operations, newest first; of one run, or all of the tenant's."""
        return self._io.run(self._api.operations(run_id, limit))

    def operation(self, operation_id: str) -> OperationInfo:
        """Reads an operation."""
        return self._io.run(self._api.operation(operation_id))

    def cancel(self, operation_id: str) -> bool:
        """Cancels an operation; True only if it never ran."""
        return self._io.run(self._api.cancel(operation_id))

    def artifacts(
        self, run_id: str | None = None, *, limit: int | None = None
    ) -> list[ArtifactInfo]:
        """Lists artifacts, newest first; of one run, or all of the tenant's."""
        return self._io.run(self._api.artifacts(run_id, limit))

    def artifact(self, artifact_id: str) -> ArtifactInfo:
        """Reads an artifact's description."""
        return self._io.run(self._api.artifact(artifact_id))

    def download_artifact(self, artifact_id: str, directory: str | Path) -> Path:
        """Downloads an artifact's files; `directory` then loads in plain `peft`.

        What is there and right is kept, and a download that broke off goes on where it stopped.

        Returns:
            The directory.

        Raises:
            ChecksumMismatchError: if a file came damaged.
        """
        return self._io.run(self._downloads.artifact(artifact_id, directory))

    def upload_artifact(
        self,
        directory: str | Path,
        model_ref: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
    ) -> ArtifactInfo:
        """Uploads an adapter that was made elsewhere, as an artifact to load or sample from.

        What is sent are the two files that `peft`'s `save_pretrained` writes,
        `adapter_config.json` and `adapter_model.safetensors`; anything else in the folder stays.
        An upload that broke off goes on where it stopped when the same call is made again.

        Args:
            directory: the folder.
            model_ref: the base model that the adapter was trained on (`client.models()`).
            metadata: your own JSON object, kept with the artifact; at most 64 KiB.
            ttl_s: how long the artifact is kept, seconds. None: until it is deleted.

        Raises:
            InvalidArgumentError: for what is no sound adapter; it names the file and the field.
            UnsupportedOptionError: for an adapter that runs here cannot have (DoRA, rsLoRA, …).
            UnknownTargetModuleError: for modules that the model lacks.
        """
        return self._io.run(self._uploads.artifact(directory, model_ref, metadata, ttl_s))

    def delete_artifact(self, artifact_id: str) -> None:
        """Deletes an artifact and its files; one that is gone already is no error.

        Raises:
            ArtifactInUseError: while a run's recovery or an unfinished operation needs it.
        """
        self._io.run(self._api.delete_artifact(artifact_id))

    def upload_dataset(
        self, source: str | Path | Iterable[Datum], name: str | None = None
    ) -> DatasetInfo:
        """Uploads a dataset, from which the server draws the batches of private runs.

        Equal content is one dataset with one privacy ledger, however often it is uploaded. An
        upload that broke off goes on where it stopped when the same call is made again.

        Args:
            source: a path to JSONL whose lines have `tokens`, `target_tokens`, maybe `weights` and
                `unit_id`; or `Datum`s, of which all have a `unit_id` or none has.
            name: free text for people.

        Raises:
            InvalidDatasetError: naming the line and field that is malformed.
        """
        return self._io.run(self._datasets.upload(source, name))

    def datasets(self) -> list[DatasetInfo]:
        """Lists the uploaded datasets, newest first."""
        return self._io.run(self._datasets.all())

    def dataset(self, dataset_id: str) -> DatasetInfo:
        """Reads a dataset's description."""
        return self._io.run(self._datasets.get(dataset_id))

    def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset's content; its privacy ledger stays.

        Raises:
            DatasetInUseError: while a run draws from it.
        """
        self._io.run(self._datasets.delete(dataset_id))

    def privacy_report(self, run_id: str) -> PrivacyReport:
        """Says what a private run and all others on its dataset have released."""
        return self._io.run(self._datasets.report(run_id))

    def models(self) -> list[ModelInfo]:
        """Lists the models that the operator has registered."""
        return self._io.run(self._api.models())

    def model(self, model_ref: str) -> ModelInfo:
        """Reads a model."""
        return self._io.run(self._api.model(model_ref))

    def losses(self, model_ref: str | None = None) -> list[LossInfo]:
        """Lists the losses that runs may use, with what each takes and gives.

        Args:
            model_ref: only those of this model. None: of all.
        """
        return self._io.run(self._api.losses(model_ref))

    def tokenizer_files(self, model_ref: str) -> dict[str, bytes]:
        """Fetches a model's tokenizer, name → content: what `data.chat.ChatTokenizer` takes."""
        return self._io.run(self._downloads.tokenizer(model_ref))

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[True], **options: Unpack[OtherSampling]
    ) -> SampleStream: ...

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[False] = False, **options: Unpack[OtherSampling]
    ) -> SampleResult: ...

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
    ) -> SampleResult | SampleStream:
        """Generates text from a base model or an artifact; waits for it, or iterates its tokens.

        The arguments are those of `TrainingClient.sample`; pass either `model` or `artifact`.
        """
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
        return SampleStream(self._session, future) if stream else future.result()

    def close(self) -> None:
        """Sends what still waits, then ends the connection; operations go on."""
        self._io.run(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
