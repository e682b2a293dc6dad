"""Calls that are not operations, as coroutines of the I/O loop: what both faces stand on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import grpc

from tensafe.v1 import (
    admin_pb2,
    artifacts_pb2,
    metrics_pb2,
    models_pb2,
    operations_pb2,
    training_pb2,
)
from tensafe_client import specs
from tensafe_client.backoff import Backoff, retryable
from tensafe_client.checks import check_bool, check_count, check_string
from tensafe_client.config import TrainingConfig
from tensafe_client.errors import (
    ConfigError,
    InvalidArgumentError,
    ServerError,
    from_rpc_error,
)
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import (
    ArtifactInfo,
    KeyInfo,
    ModelInfo,
    NewKey,
    OperationInfo,
    RunInfo,
    RunSummary,
    StorageInfo,
    TenantInfo,
    VerifyReport,
)
from tensafe_client.losses import LossInfo
from tensafe_client.results import StepMetrics
from tensafe_client.sequence import RunSequence
from tensafe_client.session import Session, new_request_id

_PAGE = 500
_ACCOUNTING_S = 120.0
"""What a noise multiplier for a target ε may take: 5 to 15 s of a free core."""


class Api:
    """Runs, operations, metrics, artifacts and models of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create_run(
        self, config: TrainingConfig | Mapping[str, Any]
    ) -> tuple[RunInfo, RunSequence]:
        """Creates a run."""
        return await self._create_run(TrainingConfig.of(config))

    async def create_run_from(
        self,
        config: TrainingConfig | Mapping[str, Any] | None,
        from_artifact: str | None,
        include_optimizer: bool | None,
    ) -> tuple[RunInfo, RunSequence]:
        """Creates a run, and loads an artifact into it if one is named."""
        if from_artifact is None:
            if include_optimizer is not None:
                raise ConfigError.of(
                    "include_optimizer", "says how from_artifact is loaded; name that, too"
                )
            if config is None:
                raise ConfigError.of(
                    "config", "must name a model_ref, unless from_artifact is given"
                )
            return await self.create_run(config)
        spec = specs.load_state("", check_string("from_artifact", from_artifact), include_optimizer)
        info, sequence = await self._create_run(await self.config_of(from_artifact, config))
        spec.run_id = info.id
        try:
            await self._session.submit_numbered(sequence, "load_state", spec)
            info = await self.run(info.id)
        except BaseException:
            await self.delete_run(info.id)
            raise
        return info, sequence

    async def _create_run(self, config: TrainingConfig) -> tuple[RunInfo, RunSequence]:
        request = training_pb2.CreateRunRequest(
            request_id=new_request_id(), config=config.to_proto()
        )
        stubs = await self._session.stubs()
        limit_s = self._session.connection.timeout_s
        if request.config.dp.HasField("target_epsilon"):
            limit_s += _ACCOUNTING_S
        response = await self._session.call(stubs.training.CreateRun, request, timeout_s=limit_s)
        return RunInfo.from_proto(response.run), self._session.operations.sequence(response.run)

    async def attach_run(self, run_id: str) -> tuple[RunInfo, RunSequence]:
        """Asks for a run's next seq."""
        stubs = await self._session.stubs()
        request = training_pb2.AttachRunRequest(run_id=check_string("run_id", run_id))
        await self._session.answered(run_id)
        response = await self._session.call(stubs.training.AttachRun, request)
        return RunInfo.from_proto(response.run), self._session.operations.sequence(response.run)

    async def run(self, run_id: str) -> RunInfo:
        """Reads a run."""
        stubs = await self._session.stubs()
        request = training_pb2.GetRunRequest(run_id=check_string("run_id", run_id))
        response = await self._session.call(stubs.training.GetRun, request)
        return RunInfo.from_proto(response.run)

    async def runs(self, include_deleted: bool, limit: int | None) -> list[RunInfo]:
        """Lists runs, newest first."""
        check_bool("include_deleted", include_deleted)
        stubs = await self._session.stubs()

        def request(size: int, token: str | None) -> Any:
            return training_pb2.ListRunsRequest(
                page_size=size, page_token=token, include_deleted=include_deleted
            )

        found = await _pages(self._session, stubs.training.ListRuns, request, "runs", limit)
        return [RunInfo.from_proto(message) for message in found]

    async def delete_run(self, run_id: str) -> RunInfo:
        """Deletes a run."""
        stubs = await self._session.stubs()
        request = training_pb2.DeleteRunRequest(
            run_id=check_string("run_id", run_id), request_id=new_request_id()
        )
        response = await self._session.call(stubs.training.DeleteRun, request)
        return RunInfo.from_proto(response.run)

    async def verify_run(
        self, run_id: str, on_progress: Callable[[int, int], None] | None
    ) -> VerifyReport:
        """Has a run replayed from its log and compared; begins anew only if the caller does."""
        stubs = await self._session.stubs()
        request = training_pb2.VerifyRunRequest(run_id=check_string("run_id", run_id))
        return await _verified(self._session, stubs.training.VerifyRun, request, on_progress)

    async def operation(self, operation_id: str) -> OperationInfo:
        """Reads an operation."""
        return OperationInfo.from_proto(await self._get_operation(operation_id))

    async def operations(self, run_id: str | None, limit: int | None) -> list[OperationInfo]:
        """Lists operations, newest first."""
        of_run = _if_given("run_id", run_id)
        stubs = await self._session.stubs()

        def request(size: int, token: str | None) -> Any:
            return operations_pb2.ListOperationsRequest(
                run_id=of_run, page_size=size, page_token=token
            )

        found = await _pages(
            self._session, stubs.operations.ListOperations, request, "operations", limit
        )
        return [OperationInfo.from_proto(message) for message in found]

    async def cancel(self, operation_id: str) -> bool:
        """Cancels an operation; True only if it never ran."""
        stubs = await self._session.stubs()
        request = operations_pb2.CancelOperationRequest(
            operation_id=check_string("operation_id", operation_id), request_id=new_request_id()
        )
        response = await self._session.call(stubs.operations.CancelOperation, request)
        cancelled: bool = response.operation.state == operations_pb2.OPERATION_STATE_CANCELLED
        return cancelled

    async def future(self, operation_id: str) -> OperationFuture[Any]:
        """Rebuilds a handle; an operation that goes on is waited for by renewed calls."""
        operation = await self._get_operation(operation_id)
        future = OperationFuture._rebuild(self._session, operation)
        if not future.done():
            self._session.operations.follow(future)
            self._session.spawn(self._session.wait_for(future, operation_id))
        return future

    def metrics(
        self, run_id: str, since: int, follow: bool
    ) -> AsyncGenerator[list[StepMetrics], None]:
        """Yields a run's metrics as the server pushes them; goes on after a break.

        Raises:
            ConfigError: for arguments of a wrong type, before anything is iterated.
        """
        since = check_count("since", since, bits=64)
        return self._metrics(run_id, since, check_bool("follow", follow))

    async def _metrics(
        self, run_id: str, since: int, follow: bool
    ) -> AsyncGenerator[list[StepMetrics], None]:
        backoff = Backoff()
        ended = False
        while not ended:
            stubs = await self._session.stubs()  # says so if the client was closed meanwhile
            request = metrics_pb2.StreamMetricsRequest(run_id=run_id, since=since, follow=follow)
            call = stubs.metrics.StreamMetrics(request, metadata=self._session.metadata)
            try:
                async for response in call:
                    backoff.reset()
                    since = response.cursor or since
                    if response.metrics:
                        yield [StepMetrics.from_proto(message) for message in response.metrics]
                ended = True
            except grpc.aio.AioRpcError as error:
                if not retryable(error):
                    raise from_rpc_error(error) from None
            finally:
                call.cancel()  # grpc.aio does not cancel a call that is merely dropped
            if not ended:
                await asyncio.sleep(backoff.next_s())

    async def artifact(self, artifact_id: str) -> ArtifactInfo:
        """Reads an artifact's description."""
        stubs = await self._session.stubs()
        request = artifacts_pb2.GetArtifactRequest(
            artifact_id=check_string("artifact_id", artifact_id)
        )
        response = await self._session.call(stubs.artifacts.GetArtifact, request)
        return ArtifactInfo.from_proto(response.artifact)

    async def artifacts(self, run_id: str | None, limit: int | None) -> list[ArtifactInfo]:
        """Lists artifacts, newest first."""
        of_run = _if_given("run_id", run_id)
        stubs = await self._session.stubs()

        def request(size: int, token: str | None) -> Any:
            return artifacts_pb2.ListArtifactsRequest(
                run_id=of_run, page_size=size, page_token=token
            )

        found = await _pages(
            self._session, stubs.artifacts.ListArtifacts, request, "artifacts", limit
        )
        return [ArtifactInfo.from_proto(message) for message in found]

    async def delete_artifact(self, artifact_id: str) -> None:
        """Deletes an artifact."""
        stubs = await self._session.stubs()
        request = artifacts_pb2.DeleteArtifactRequest(
            artifact_id=check_string("artifact_id", artifact_id), request_id=new_request_id()
        )
        await self._session.call(stubs.artifacts.DeleteArtifact, request)

    async def config_of(
        self, artifact_id: str, config: TrainingConfig | Mapping[str, Any] | None
    ) -> TrainingConfig:
        """The configuration of a run that continues from an artifact: that of the run that was
        saved, or the uploaded adapter's shape, with the given fields over it."""
        artifact = await self.artifact(artifact_id)
        if isinstance(config, TrainingConfig):
            return config
        base: dict[str, Any] = {"model_ref": artifact.model_ref}
        if artifact.run_id:
            base = (await self.run(artifact.run_id)).config.given_fields()
        elif artifact.adapter.rank:
            base["lora_config"] = {
                "rank": artifact.adapter.rank,
                "alpha": artifact.adapter.alpha,
                "dropout": artifact.adapter.dropout,
                "target_modules": list(artifact.adapter.target_modules),
            }
        return TrainingConfig.of({**base, **(config or {})})

    async def model(self, model_ref: str) -> ModelInfo:
        """Reads a model."""
        stubs = await self._session.stubs()
        request = models_pb2.GetModelRequest(model_ref=check_string("model_ref", model_ref))
        response = await self._session.call(stubs.models.GetModel, request)
        return ModelInfo.from_proto(response.model)

    async def models(self) -> list[ModelInfo]:
        """Lists the models."""
        stubs = await self._session.stubs()
        response = await self._session.call(stubs.models.ListModels, models_pb2.ListModelsRequest())
        return [ModelInfo.from_proto(message) for message in response.models]

    async def losses(self, model_ref: str | None) -> list[LossInfo]:
        """Lists the losses of one model, or of all."""
        stubs = await self._session.stubs()
        request = models_pb2.ListLossesRequest(
            model_ref=None if model_ref is None else check_string("model_ref", model_ref)
        )
        response = await self._session.call(stubs.models.ListLosses, request)
        return [LossInfo.from_proto(message) for message in response.losses]

    async def _get_operation(self, operation_id: str) -> operations_pb2.Operation:
        stubs = await self._session.stubs()
        request = operations_pb2.GetOperationRequest(
            operation_id=check_string("operation_id", operation_id)
        )
        response = await self._session.call(stubs.operations.GetOperation, request)
        operation: operations_pb2.Operation = response.operation
        return operation


class AdminApi:
    """Tenants and keys of one session; needs an admin key."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create_tenant(self, name: str) -> TenantInfo:
        """Creates a tenant."""
        stubs = await self._session.stubs()
        request = admin_pb2.CreateTenantRequest(
            request_id=new_request_id(), name=check_string("name", name)
        )
        response = await self._session.call(stubs.admin.CreateTenant, request)
        return TenantInfo.from_proto(response.tenant)

    async def tenants(self) -> list[TenantInfo]:
        """Lists the tenants."""
        stubs = await self._session.stubs()
        response = await self._session.call(stubs.admin.ListTenants, admin_pb2.ListTenantsRequest())
        return [TenantInfo.from_proto(message) for message in response.tenants]

    async def storage(self) -> StorageInfo:
        """Asks what takes how much disk."""
        stubs = await self._session.stubs()
        response = await self._session.call(stubs.admin.GetStorage, admin_pb2.GetStorageRequest())
        return StorageInfo.from_proto(response)

    async def runs(
        self, tenant: str | None, include_deleted: bool, limit: int | None
    ) -> list[RunSummary]:
        """Lists runs of all tenants or of one, newest first."""
        of_tenant = _if_given("tenant", tenant)
        deleted = check_bool("include_deleted", include_deleted)
        stubs = await self._session.stubs()

        def request(size: int, token: str | None) -> Any:
            return admin_pb2.AdminServiceListRunsRequest(
                tenant=of_tenant, include_deleted=deleted, page_size=size, page_token=token
            )

        found = await _pages(self._session, stubs.admin.ListRuns, request, "runs", limit)
        return [RunSummary.from_proto(message) for message in found]

    async def verify_run(
        self, run_id: str, on_progress: Callable[[int, int], None] | None
    ) -> VerifyReport:
        """Has a run of any tenant replayed from its log and compared."""
        stubs = await self._session.stubs()
        request = admin_pb2.AdminServiceVerifyRunRequest(run_id=check_string("run_id", run_id))
        return await _verified(self._session, stubs.admin.VerifyRun, request, on_progress)

    async def create_key(self, kind: str, tenant: str | None, name: str) -> NewKey:
        """Creates a key."""
        kinds = {
            "tenant": admin_pb2.KEY_KIND_TENANT,
            "admin": admin_pb2.KEY_KIND_ADMIN,
            "worker": admin_pb2.KEY_KIND_WORKER,
        }
        if check_string("kind", kind) not in kinds:
            raise InvalidArgumentError.of(
                "kind", f"must be one of {', '.join(kinds)}, got {kind!r}"
            )
        stubs = await self._session.stubs()
        request = admin_pb2.CreateKeyRequest(
            request_id=new_request_id(),
            kind=kinds[kind],
            tenant=_if_given("tenant", tenant),
            name=check_string("name", name),
        )
        response = await self._session.call(stubs.admin.CreateKey, request)
        return NewKey(KeyInfo.from_proto(response.key), response.secret)

    async def keys(self, tenant: str | None) -> list[KeyInfo]:
        """Lists keys."""
        stubs = await self._session.stubs()
        request = admin_pb2.ListKeysRequest(tenant=_if_given("tenant", tenant))
        response = await self._session.call(stubs.admin.ListKeys, request)
        return [KeyInfo.from_proto(message) for message in response.keys]

    async def revoke_key(self, key_id: str) -> KeyInfo:
        """Revokes a key."""
        stubs = await self._session.stubs()
        request = admin_pb2.RevokeKeyRequest(
            key_id=check_string("key_id", key_id), request_id=new_request_id()
        )
        response = await self._session.call(stubs.admin.RevokeKey, request)
        return KeyInfo.from_proto(response.key)


def _if_given(field: str, value: str | None) -> str | None:
    return None if value is None else check_string(field, value)


async def _pages(
    session: Session,
    method: Any,
    request: Callable[[int, str | None], Any],
    field: str,
    limit: int | None,
) -> list[Any]:
    if limit is not None and check_count("limit", limit, bits=63) < 1:
        raise InvalidArgumentError.of("limit", f"must be 1 or more, got {limit}")
    found: list[Any] = []
    token: str | None = None
    while True:
        size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        response = await session.call(method, request(size, token))
        found += getattr(response, field)
        token = response.next_page_token
        if not token or (limit is not None and len(found) >= limit):
            return found[:limit]


async def _verified(
    session: Session,
    method: Any,
    request: Any,
    on_progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    if on_progress is not None and not callable(on_progress):
        raise ConfigError.of("on_progress", f"must be a function, got {on_progress!r}")
    call = method(request, metadata=session.metadata)
    try:
        async for response in call:
            if response.HasField("report"):
                return VerifyReport.from_proto(request.run_id, response.report)
            if on_progress is not None:
                on_progress(response.progress.replayed, response.progress.total)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()
    raise ServerError(f"the server ended the verification of {request.run_id} without a report")
